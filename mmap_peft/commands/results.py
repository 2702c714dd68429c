"""Accuracies before and after training, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..multitask.classifier import MultiTaskClassifier
from ..multitask.record import versions


def results(
    classifier: MultiTaskClassifier, zero_shot: dict[str, float], trained: dict[str, float], **more: Any
) -> dict[str, Any]:
    """Accuracies before and after training, parameters, groups and versions.

    Args:
        classifier (`MultiTaskClassifier`): the trained classifier.
        zero_shot, trained (`dict[str, float]`): metrics from `MultiTaskTrainer.evaluate`, with the prefixes
            `"zero_shot"` and `"eval"`.
        more: other fields, such as `seed` and `seconds`.
    """
    names = [*(task.adapter for task in classifier.tasks.values()), "mean", "worst"]
    trainable = sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
    return {
        "accuracy": {
            name: {"zero_shot": zero_shot[f"zero_shot_{name}_accuracy"], "trained": trained[f"eval_{name}_accuracy"]}
            for name in names
            if f"eval_{name}_accuracy" in trained
        },
        "groups": None if classifier.grouping is None else classifier.grouping.groups,
        "remarks": [] if classifier.grouping is None else classifier.grouping.remarks,
        "trainable_parameters": trainable,
        "share_of_base": trainable / classifier.base_size,
        "base_model": classifier.clip.name_or_path,
        "versions": versions(),
        **more,
    }


def results_table(results: dict[str, Any]) -> str:
    """Results as a Markdown table, followed by the groups and the number of parameters."""
    rows = []
    for name, accuracy in results["accuracy"].items():
        if len(results["accuracy"]) == 3 and rows:  # mean and worst of one task
            break
        before, after = 100 * accuracy["zero_shot"], 100 * accuracy["trained"]
        rows.append([name, f"{before:.1f} %", f"{after:.1f} %", f"{after - before:+.1f}"])
    groups = "; ".join(", ".join(group) for group in results["groups"] or [])
    trained = (
        f"Trained: {results['trainable_parameters']:,} parameters, {100 * results['share_of_base']:.2f} % of the base."
    )
    lines = [*table(["task", "zero-shot", "trained", "gain"], rows), ""]
    return "\n".join([*lines, f"Groups: {groups}. {trained}" if groups else trained, *results["remarks"]])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """The lines of a Markdown table, of which the first `texts` columns are text and the others numbers."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [head, *rows]]
    rule = "|" + "".join("---|" if number < texts else "---:|" for number in range(len(head)))
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return [first, rule, *others]

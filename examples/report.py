"""The results that the examples write and print: accuracies before and after training, as JSON and as a table."""

from __future__ import annotations

from typing import Any

from mmap_peft import MultiTaskClassifier
from mmap_peft.multitask.record import versions


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


def table(results: dict[str, Any]) -> str:
    """Results as a Markdown table, followed by the groups and the number of parameters."""
    lines = ["| task | zero-shot | trained | gain |", "|---|---:|---:|---:|"]
    for name, accuracy in results["accuracy"].items():
        before, after = 100 * accuracy["zero_shot"], 100 * accuracy["trained"]
        lines.append(f"| {name} | {before:.1f} % | {after:.1f} % | {after - before:+.1f} |")
    groups = "; ".join(", ".join(group) for group in results["groups"] or [])
    lines.append(
        f"\nGroups: {groups}. Trained: {results['trainable_parameters']:,} parameters, "
        f"{100 * results['share_of_base']:.2f} % of the base."
    )
    return "\n".join([*lines, *results["remarks"]])

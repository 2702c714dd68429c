"""The part of a report about planted families: which groups were found, and what they are worth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from mmap_peft.multitask.grouping import are_stable

from .run import Run
from .study import Study
from .summary import Row


MEANS = ("ari", "stability", "separation", "reliability")


def planted_lines(study: Study, results: dict[str, dict[str, Any]]) -> list[str]:
    """The tables of the runs of stage 1 alone, and of the tasks that were held out, as far as there are results.

    Args:
        study (`Study`): the study.
        results: what `Results.read` returned.
    """
    lines = []
    for kind, table in ("groups", _groups_table), ("new_tasks", _new_tasks_table):
        found = [(run, results[run.name]) for run in study.planted_runs(kind) if run.name in results]
        if found:
            lines += [*table(found), ""]
    return lines


def _groups_table(found: Sequence[tuple[Run, dict[str, Any]]]) -> list[str]:
    lines = [
        "## Groups found",
        "",
        "Stage 1 alone. Found: seeds in which the groups were exactly the families; stable: seeds in which they were "
        "said to be stable; ARI: adjusted Rand index with the families. The last four columns are means over seeds.",
        "",
        "| families | affinity | seeds | found | stable | ARI | stability | separation | reliability |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label in dict.fromkeys(run.data.label for run, _ in found):
        of_label = [result["affinities"] for run, result in found if run.data.label == label]
        for affinity in of_label[0]:
            some = [each[affinity] for each in of_label]
            stable = sum(are_stable(each["stability"], each["separation"]) for each in some)
            counts = [len(some), sum(each["ari"] == 1 for each in some), stable]
            means = [statistics.fmean(each[key] or 0 for each in some) for key in MEANS]
            cells = [label, affinity, *map(str, counts), *(f"{mean:.2f}" for mean in means)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _new_tasks_table(found: Sequence[tuple[Run, dict[str, Any]]]) -> list[str]:
    lines = [
        "## New tasks",
        "",
        "Each task is held out once and added to the classifier of the others, which has the planted groups. Accuracy "
        'in % after its own prompts were trained with those of the group that `group="nearest"` chose, of the best '
        "and of the worst group in hindsight, and without a group.",
        "",
        "| families | tasks | its family | best in hindsight | nearest | best | worst | no group | sure |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label in dict.fromkeys(run.data.label for run, _ in found):
        tasks = [each for run, result in found if run.data.label == label for each in result["tasks"].values()]
        by_group = [[value for group, value in each["accuracy"].items() if group != "none"] for each in tasks]
        chosen = [each["accuracy"][each["chosen"]] for each in tasks]
        counts = [
            len(tasks),
            sum(each["chosen"] == each["family"] for each in tasks),
            sum(value == max(values) for value, values in zip(chosen, by_group)),
        ]
        alone = [each["accuracy"]["none"] for each in tasks]
        means = map(statistics.fmean, (chosen, map(max, by_group), map(min, by_group), alone))
        sure = statistics.fmean(each["probability"] for each in tasks)
        cells = [label, *map(str, counts), *(f"{100 * mean:.1f}" for mean in means), f"{sure:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def routing_lines(rows: Sequence[Row]) -> list[str]:
    """A table of predictions for test images whose task is not given."""
    routed = [row for row in rows if all("routing" in result for result in row.results.values())]
    lines = []
    for row in routed:
        cells = [row.mean("routing", key) for key in ("tasks", "answers", "given")]
        lines.append(f"| {row.experiment.name} | {' | '.join(f'{100 * value:.1f}' for value in cells)} |")
    head = [
        "Test images whose task is not given: share whose task was found, share whose class was right, and share "
        "whose class was right when the task was given.",
        "",
        "| experiment | task found | class | class, task given |",
        "|---|---:|---:|---:|",
    ]
    return [*head, *lines] if lines else []

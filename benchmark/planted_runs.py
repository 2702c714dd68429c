"""Runs on planted families that are no training of all tasks: the groups that each affinity finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import set_seed

from mmap_peft.multitask.affinity import AFFINITIES, adjusted_rand_index, snapshot_steps
from mmap_peft.multitask.arguments import MultiTaskTrainingArguments
from mmap_peft.multitask.grouping import TaskGrouping
from mmap_peft.multitask.task import Task

from .planted import planted_groups
from .study import Run
from .trainers import make_trainer


def measure_groups(run: Run, tasks: list[Task], args: MultiTaskTrainingArguments) -> dict[str, Any]:
    """Stage 1 with the snapshots of all affinities, and the groups that each of them finds.

    Returns:
        `affinities`: for each the groups, `ari` (their adjusted Rand index with the planted families), `stability`,
        `stable`, and `reliability` (mean of the tasks); and as `mean` the `ari` of the run's own affinity.
    """
    set_seed(run.seed)
    stage = make_trainer(run, tasks, args).shared_adapter_trainer()
    steps = {each: snapshot_steps(each, args.grouping_steps, args.grouping_snapshots) for each in AFFINITIES}
    stage.snapshot_steps = lambda: sorted({step for some in steps.values() for step in some})
    stage.train()
    names, found = [task.name for task in tasks], {}
    planted = group_numbers(planted_groups(run.data.family), names)
    for affinity in AFFINITIES:
        snapshots = [each for each in stage.snapshots if each.step in steps[affinity]]
        limits = args.threshold, args.max_groups, "keep", args.grouping_seconds, args.seed
        grouping = TaskGrouping.from_gradients(names, snapshots, affinity, *limits)
        found[affinity] = {
            "groups": grouping.groups,
            "ari": adjusted_rand_index(group_numbers(grouping.groups, names), planted),
            "stability": grouping.stability,
            "stable": grouping.is_stable,
            "reliability": float(grouping.reliability.mean()),
        }
    return {"affinities": found, "mean": found[args.affinity]["ari"]}


def group_numbers(groups: Sequence[Sequence[str]], tasks: Sequence[str]) -> list[int]:
    """The number of each task's group."""
    return [next(number for number, group in enumerate(groups) if task in group) for task in tasks]


PLANTED_RUNS = {"groups": measure_groups}

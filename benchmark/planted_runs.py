"""Runs on planted families: the groups that each affinity finds, and tasks that are added later."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import AutoModel, set_seed

from mmap_peft.multitask.affinity import AFFINITIES, adjusted_rand_index, snapshot_steps
from mmap_peft.multitask.arguments import MultiTaskTrainingArguments
from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.multitask.grouping import TaskGrouping
from mmap_peft.multitask.task import Task
from mmap_peft.multitask.task_trainer import TaskTrainer
from mmap_peft.multitask.trainer import MultiTaskTrainer

from .planted import planted_groups
from .run import Run
from .trainers import make_trainer


def measure_groups(run: Run, tasks: list[Task], args: MultiTaskTrainingArguments) -> dict[str, Any]:
    """Stage 1 with the snapshots of all affinities, and the groups that each of them finds.

    Returns:
        `affinities`: for each the groups, `ari` (their adjusted Rand index with the planted families), `stability`,
        `separation` and `reliability` (mean of the tasks); as `mean` the `ari` of the run's own affinity.
    """
    set_seed(run.seed)
    stage = make_trainer(run, tasks, args).shared_adapter_trainer()
    steps = {each: snapshot_steps(each, args.grouping_steps, args.grouping_snapshots) for each in AFFINITIES}
    stage.snapshot_steps = lambda: sorted({step for some in steps.values() for step in some})
    stage.train()
    names, found = [task.name for task in tasks], {}
    planted = TaskGrouping(names, planted_groups(run.data.family)).group_numbers
    for affinity in AFFINITIES:
        snapshots = [each for each in stage.snapshots if each.step in steps[affinity]]
        limits = args.threshold, args.max_groups, "keep", args.grouping_seconds, args.seed
        grouping = TaskGrouping.from_gradients(names, snapshots, affinity, *limits)
        found[affinity] = {
            "groups": grouping.groups,
            "ari": adjusted_rand_index(grouping.group_numbers, planted),
            "stability": grouping.stability,
            "separation": grouping.separation,
            "reliability": float(grouping.reliability.mean()),
        }
    return {"affinities": found, "mean": found[args.affinity]["ari"]}


def measure_new_tasks(run: Run, tasks: list[Task], args: MultiTaskTrainingArguments) -> dict[str, Any]:
    """Hold out each task once, train the others in the planted groups, and add it with each of the groups and alone.

    Returns:
        `tasks`: for each the group that is `chosen` as the nearest and that of its `family`, both by their names, the
        `probability` and the `losses` of the choice, and the test `accuracy` by group, and of `"none"`; and as `mean`
        the mean accuracy with the chosen groups.
    """
    found, families = {}, planted_groups(run.data.family)
    for new in tasks:
        set_seed(run.seed)
        groups = [[name for name in group if name != new.name] for group in families]
        given = {"grouping": "given", "given_groups": ",".join(map("+".join, groups)), "grouping_steps": 0}
        base = make_trainer(run, [task for task in tasks if task is not new], dataclasses.replace(args, **given))
        base.train()
        folder = Path(args.output_dir, "classifier")
        base.model.save_pretrained(folder)
        nearest = base.model.nearest_group(new, run.seed)
        names = [f"group_{number}" for number in range(len(groups))]
        found[new.name] = {
            "chosen": nearest.group,
            "family": names[next(number for number, group in enumerate(families) if new.name in group)],
            "probability": nearest.probability,
            "losses": nearest.losses,
            "accuracy": {name or "none": _accuracy_of_new(folder, base, new, name, args) for name in [*names, None]},
        }
    return {"tasks": found, "mean": fmean(each["accuracy"][each["chosen"]] for each in found.values())}


def _accuracy_of_new(
    folder: Path, base: TaskTrainer, new: Task, group: str | None, args: MultiTaskTrainingArguments
) -> float:
    """The test accuracy of a task that is added to a saved classifier with the prompts of a group."""
    model = AutoModel.from_pretrained(base.model.clip.name_or_path)
    classifier = MultiTaskClassifier.from_pretrained(folder, model, base.model.processor)
    classifier.add_task(new, group, seed=args.seed)
    trainer = MultiTaskTrainer(model=classifier, args=dataclasses.replace(args, output_dir=f"{args.output_dir}/new"))
    trainer.train()
    return trainer.evaluate()[f"eval_{new.adapter}_accuracy"]


PLANTED_RUNS = {"groups": measure_groups, "new_tasks": measure_new_tasks}

"""Protocols of the field: which tasks train on which classes, and what is evaluated that never trained.

Images of tasks that never trained have no task of the classifier. If its tasks use different adapters, these are found
for each image as by `MultiTaskClassifier.predict` without a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from mmap_peft.data.duplicates import drop_duplicates
from mmap_peft.data.splits import Split
from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.multitask.output import Prediction, RoutedPrediction
from mmap_peft.multitask.task import Task

from .data import DataSet
from .means import BASE, HALVES, HARMONIC
from .predictions import SCHEMA, image_names
from .run import Run


AT_ONCE = 256  # images

Answer = Callable[[list[Any]], Prediction | RoutedPrediction]
Tables = dict[str, pa.Table]  # predictions by the name of what is evaluated


@dataclass(frozen=True)
class Training:
    """One classifier of a run.

    Args:
        tasks: the tasks that it is trained on.
        evaluate (*optional*): makes tables of predictions, as `predictions.predict`, by the name of what is evaluated.
            Zero-shot calls it inside `zero_shot()`. `None`: its tasks are evaluated.
    """

    tasks: list[Task]
    evaluate: Callable[[MultiTaskClassifier], Tables] | None = None


@dataclass(frozen=True)
class Target:
    """A data set that evaluates and does not train, with its images and their split."""

    data: DataSet
    domains: dict[str, Dataset]
    split: Split


def read_targets(run: Run) -> list[Target]:
    """The targets of a run, with as many training images, which are not used, as its own data set."""
    return [Target(data, *data.read(run.fraction, run.shots, run.seed)) for data in run.targets]


def evaluated(
    domains: dict[str, Dataset], split: Split, targets: Sequence[Target]
) -> tuple[dict[str, Dataset], Split]:
    """The domains of a run and its targets, and a split of them: what trains, and what is evaluated."""
    if not targets:
        return domains, split
    others = {f"{each.data.label}: {name}": data for each in targets for name, data in each.domains.items()}
    files = {f"{each.data.label}: {name}": list(part) for each in targets for name, part in each.split.eval.items()}
    train, nothing = {**split.train, **{name: [] for name in files}}, {name: [] for name in split.train}
    return {**domains, **others}, Split(train, {**nothing, **files}, split.source)


def without_duplicates(run: Run, domains: dict[str, Dataset], split: Split, targets: Sequence[Target]) -> Split:
    """The split without training images that are near-duplicates of the targets' test images, if the data set drops
    duplicates; those of its own test images were dropped when it was read."""
    if not targets or not run.data.drop_duplicates:
        return split
    clean = drop_duplicates(*evaluated(domains, split, targets))
    dropped = split.source.get("duplicates", 0) + clean.source["duplicates"]
    train = {name: clean.train[name] for name in split.train}
    return replace(split, train=train, source={**split.source, "duplicates": dropped})


def trainings(run: Run, tasks: list[Task], targets: Sequence[Target] | None = None) -> list[Training]:
    """The classifiers that the protocol of a run trains, each with its evaluation.

    * `"multi_task"`: all tasks train, together or each alone, and are evaluated.
    * `"base_to_new"`: the first half of each task's classes trains, rounded up; images of these (`base`) and of the
      others (`new`) are classified among their own half (Zhou et al., "Conditional Prompt Learning for Vision-Language
      Models", CVPR 2022, section 4.1).
    * `"cross_dataset"`: the tasks of the run's data set train; the test images are those of its `targets` (the same
      paper, section 4.2).
    * `"forgetting"`: the same, and the plain base after the training, as `<task>_base`.
    * `"leave_one_domain_out"`: each task in turn does not train, and its test images are classified.

    `targets` are read if they are not given.

    Raises:
        ValueError: the tasks do not fit the protocol.
    """
    if run.protocol in ("multi_task", HARMONIC):
        if halves := run.protocol == HARMONIC:
            tasks = [_base(task) for task in tasks]
            _check_classes(run, tasks[0].trained_classes, tasks[:1])
        parts = [[task] for task in tasks] if run.experiment.tasks == "alone" else [tasks]
        return [
            Training(part, (lambda classifier, part=part: _base_to_new(classifier, part)) if halves else None)
            for part in parts
        ]
    if run.protocol == "leave_one_domain_out":
        if len(tasks) < 2:
            raise ValueError("leave_one_domain_out trains all tasks but one, but there is one task only; add others.")
        _check_classes(run, _of_all(tasks), tasks)
        return [
            Training(
                [other for other in tasks if other is not task],
                lambda classifier, task=task: {task.adapter: _unseen(classifier, task, task.adapter)},
            )
            for task in tasks
        ]
    if run.experiment.tasks == "alone" and len(tasks) > 1:
        raise ValueError(
            f"Experiment {run.experiment.name!r} trains each of {len(tasks)} tasks alone, so {run.protocol} would not "
            "know which of the classifiers to evaluate; write tasks: together."
        )
    others = _target_tasks(run, tasks, read_targets(run) if targets is None else targets)
    return [Training(tasks, lambda classifier: _targets(run, classifier, others))]


def _target_tasks(run: Run, tasks: list[Task], targets: Sequence[Target]) -> dict[str, Task]:
    """The tasks of the targets, by their names in results."""
    others: dict[str, Task] = {}
    for target in targets:
        for task in target.data.make_tasks(target.split, target.domains, tasks[0].template):
            name = f"{target.data.label}_{task.adapter}"
            if name in others or name.endswith(BASE):
                raise ValueError(
                    f"A task of target {target.data.label!r} would be called {name!r} in the results, as another one "
                    "or what the plain base gives; give the target another label, or rename its domain."
                )
            others[name] = task
    _check_classes(run, _of_all(tasks), others.values())
    return others


def _of_all(tasks: Sequence[Task]) -> set[str]:
    """The classes that all tasks have: an image without a task may be given to any of them."""
    return set.intersection(*(set(task.class_names) for task in tasks))


def _check_classes(run: Run, trained: Iterable[str], tasks: Iterable[Task]) -> None:
    """Raise a `ValueError` if a method with parameters for each class would have to tell classes that do not train."""
    new = sorted({name for task in tasks for name in task.class_names} - set(trained))
    if new and (run.experiment.method == "linear_probe" or run.experiment.config.get("num_classes")):
        raise ValueError(
            f"Experiment {run.experiment.name!r} has parameters for each class by itself, but with {run.protocol} "
            f"images of classes that do not train are evaluated, such as {new[0]!r}; leave it out."
        )


def _base(task: Task) -> Task:
    """The task with the first half of its classes to train."""
    half = math.ceil(len(task.class_names) / 2)
    counts = np.bincount(task.labels("eval"), minlength=len(task.class_names))
    if len(task.class_names) < 4 or not (counts[:half].any() and counts[half:].any()):
        raise ValueError(
            f"Task {task.name!r} has {len(task.class_names)} classes, {np.count_nonzero(counts)} of them with test "
            "images, but base_to_new needs two classes or more in each half, and test images of each half; leave the "
            "task out."
        )
    return replace(task, classes_for_training=task.class_names[:half])


def _base_to_new(classifier: MultiTaskClassifier, tasks: list[Task]) -> Tables:
    found = {}
    for task in tasks:
        new = [name for name in task.class_names if name not in task.trained_classes]
        for half, names in zip(HALVES, (task.trained_classes, new)):
            name = f"{task.adapter}{half}"
            found[name] = _table(
                task, name, names,
                lambda images, task=task, names=names: classifier.predict(images, task.name, class_names=names),
            )  # fmt: skip
    return found


def _targets(run: Run, classifier: MultiTaskClassifier, targets: dict[str, Task]) -> Tables:
    found = {name: _unseen(classifier, task, name) for name, task in targets.items()}
    if run.protocol == "forgetting":
        for name, task in targets.items():
            with classifier.zero_shot():
                found[f"{name}{BASE}"] = _of_first_task(classifier, task, f"{name}{BASE}")
    return found


def _unseen(classifier: MultiTaskClassifier, task: Task, name: str) -> pa.Table:
    """Predictions for a task that the classifier does not have."""
    if len(set(classifier.current_routes.values())) == 1:
        return _of_first_task(classifier, task, name)
    if classifier.prototypes is None:
        classifier.compute_prototypes()
    texts = _texts(classifier, task)
    return _table(task, name, task.class_names, lambda images: classifier.predict(images, **texts))


def _of_first_task(classifier: MultiTaskClassifier, task: Task, name: str) -> pa.Table:
    """The same with the adapters of the classifier's first task, which are those of all tasks, or none."""
    first, texts = next(iter(classifier.tasks)), _texts(classifier, task)
    return _table(task, name, task.class_names, lambda images: classifier.predict(images, first, **texts))


def _texts(classifier: MultiTaskClassifier, task: Task) -> dict[str, Any]:
    """The arguments of `predict` for the classes of a task that the classifier does not have. Where prompts replace
    words, the words stay those of the training, as in the code of the methods' authors; a linear probe has none."""
    same = all(each.template == task.template for each in classifier.tasks.values())
    replaced = classifier.texts.placeholders and any(classifier.current_routes.values())
    unused = not all(map(classifier.adapter_set.uses_texts, classifier.current_routes.values()))
    return {"class_names": task.class_names, "templates": None if same or replaced or unused else task.template}


def _table(task: Task, name: str, class_names: list[str], answer: Answer) -> pa.Table:
    """Predictions of the test images of these classes."""
    place = {each: number for number, each in enumerate(class_names)}
    labels = [task.class_names[number] for number in task.labels("eval")]
    rows = [row for row, label in enumerate(labels) if label in place]
    columns: dict[str, list[Any]] = {column: [] for column in SCHEMA.names}
    files = image_names(task)
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        found = answer(task.eval[some]["image"])
        true, probabilities = [labels[row] for row in some], found.probabilities.numpy()
        columns["task"] += [name] * len(some)
        columns["image"] += [files[row] for row in some]
        columns["true"] += true
        columns["predicted"] += found.labels
        columns["probability_true"] += probabilities[np.arange(len(some)), [place[each] for each in true]].tolist()
        columns["probability_predicted"] += probabilities.max(axis=1).tolist()
    return pa.table(columns, SCHEMA)

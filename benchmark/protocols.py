"""Protocols of the field: which tasks train on which classes, and what is evaluated that never trained.

Images of tasks that never trained have no task of the classifier. If its tasks use different adapters, these are found
for each image as by `MultiTaskClassifier.predict` without a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.multitask.output import Prediction, RoutedPrediction
from mmap_peft.multitask.task import Task

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
            `None`: its tasks are.
    """

    tasks: list[Task]
    evaluate: Callable[[MultiTaskClassifier], Tables] | None = None


def trainings(run: Run, tasks: list[Task]) -> list[Training]:
    """The classifiers that the protocol of a run trains, each with its evaluation.

    * `"multi_task"`: all tasks train, together or each alone, and are evaluated.
    * `"base_to_new"`: the first half of each task's classes trains, rounded up; images of these (`base`) and of the
      others (`new`) are classified among their own half (Zhou et al., "Conditional Prompt Learning for Vision-Language
      Models", CVPR 2022, section 4.1).
    * `"cross_dataset"`: the tasks of the run's data set train; the test images are those of its `targets` (the same
      paper, section 4.2).
    * `"forgetting"`: the same, and the plain base after the training, as `<task>_base`.
    * `"leave_one_domain_out"`: each task in turn does not train, and its test images are classified.
    """
    if run.protocol in ("multi_task", HARMONIC):
        halves = run.protocol == HARMONIC
        tasks = [_base(task) for task in tasks] if halves else tasks
        parts = [[task] for task in tasks] if run.experiment.tasks == "alone" else [tasks]
        return [
            Training(part, (lambda classifier, part=part: _base_to_new(run, classifier, part)) if halves else None)
            for part in parts
        ]
    if run.protocol == "leave_one_domain_out":
        return [
            Training(
                [other for other in tasks if other is not task],
                lambda classifier, task=task: {task.adapter: _unseen(run, classifier, task, task.adapter)},
            )
            for task in tasks
        ]
    targets = {f"{data.label}_{task.adapter}": task for data in run.targets for task in test_tasks(run, data, tasks)}
    return [Training(tasks, lambda classifier: _targets(run, classifier, targets))]


def test_tasks(run: Run, data: Any, like: Sequence[Task]) -> list[Task]:
    """The tasks of a data set with the test images that a run has of it, and the template of the run's tasks."""
    domains, split = data.read(run.fraction, run.shots, run.seed)
    return data.make_tasks(split, domains, like[0].template)


def _base(task: Task) -> Task:
    """The task with the first half of its classes to train."""
    return replace(task, classes_for_training=task.class_names[: math.ceil(len(task.class_names) / 2)])


def _base_to_new(run: Run, classifier: MultiTaskClassifier, tasks: list[Task]) -> Tables:
    found = {}
    for task in tasks:
        new = [name for name in task.class_names if name not in task.trained_classes]
        for half, names in zip(HALVES, (task.trained_classes, new)):
            name = f"{task.adapter}{half}"
            found[name] = _table(
                run, classifier, task, name, names,
                lambda images, task=task, names=names: classifier.predict(images, task.name, class_names=names),
            )  # fmt: skip
    return found


def _targets(run: Run, classifier: MultiTaskClassifier, targets: dict[str, Task]) -> Tables:
    found = {name: _unseen(run, classifier, task, name) for name, task in targets.items()}
    if run.protocol == "forgetting":
        for name, task in targets.items():
            with classifier.zero_shot():
                found[f"{name}{BASE}"] = _of_first_task(run, classifier, task, f"{name}{BASE}")
    return found


def _unseen(run: Run, classifier: MultiTaskClassifier, task: Task, name: str) -> pa.Table:
    """Predictions for a task that the classifier does not have."""
    if run.experiment.method == "zero_shot" or len(set(classifier.routes.values())) == 1:
        return _of_first_task(run, classifier, task, name)
    if classifier.prototypes is None:
        classifier.compute_prototypes()
    texts = _texts(classifier, task)
    return _table(run, classifier, task, name, task.class_names, lambda images: classifier.predict(images, **texts))


def _of_first_task(run: Run, classifier: MultiTaskClassifier, task: Task, name: str) -> pa.Table:
    """The same with the adapters of the classifier's first task, which are those of all tasks, or none."""
    first, texts = next(iter(classifier.tasks)), _texts(classifier, task)
    return _table(
        run, classifier, task, name, task.class_names, lambda images: classifier.predict(images, first, **texts)
    )


def _texts(classifier: MultiTaskClassifier, task: Task) -> dict[str, Any]:
    """The arguments of `predict` for the classes of a task that the classifier does not have."""
    own = next(iter(classifier.tasks.values())).template
    return {"class_names": task.class_names, "templates": None if task.template == own else task.template}


def _table(
    run: Run, classifier: MultiTaskClassifier, task: Task, name: str, class_names: list[str], answer: Answer
) -> pa.Table:
    """Predictions of the test images of these classes."""
    place = {each: number for number, each in enumerate(class_names)}
    labels = [task.class_names[number] for number in task.labels("eval")]
    rows = [row for row, label in enumerate(labels) if label in place]
    columns: dict[str, list[Any]] = {column: [] for column in SCHEMA.names}
    files, plain = image_names(task), run.experiment.method == "zero_shot"
    with classifier.zero_shot() if plain else nullcontext():
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

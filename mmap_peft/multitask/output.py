"""What a classifier returns, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..tuner.devices import on_device
from .images import IGNORE_INDEX
from .task import Task


@dataclass
class MultiTaskOutput(ModelOutput):
    """What `MultiTaskClassifier` returns.

    Args:
        loss (`torch.Tensor`, *optional*): cross entropy over each image's own classes, mean over the images, and the
            consistency losses.
        logits (`torch.Tensor`): (batch, classes of the task with most of them); -inf beyond an image's own classes,
            and in training for classes that are not trained.
        consistency (`torch.Tensor`, *optional*): the part of each task in the consistency losses, (tasks,).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    consistency: torch.Tensor | None = None


class Prediction(NamedTuple):
    """Classes of some images.

    Attributes:
        labels: the most probable class name of each image.
        probabilities: (images, classes of the task with most of them), in the order of the class names of each image's
            task; 0 beyond them. With `class_names`: (images, class names), in their order.
    """

    labels: list[str]
    probabilities: torch.Tensor


class RoutedPrediction(NamedTuple):
    """Classes and tasks of some images whose tasks were not given.

    Attributes:
        labels: the most probable class name of each image, among those of all tasks.
        probabilities: (images, class names), in the order of `class_names`: the sum over tasks of
            P(task) * P(class | task), of the tasks with a probability of 0.05 or more, scaled to a sum of 1 (of the
            most probable one if no task has so much). A class that several tasks have, by the same name, is one class.
        tasks: the most probable task of each image.
        task_probabilities: (images, tasks), in the order of the classifier's tasks.
        class_names: the class names of all tasks, each once, or those that were given to `predict`.
    """

    labels: list[str]
    probabilities: torch.Tensor
    tasks: list[str]
    task_probabilities: torch.Tensor
    class_names: list[str]


def of_trained_classes(
    logits: torch.Tensor, tasks: Sequence[Task], shown: Sequence[Sequence[str]], rows: torch.Tensor
) -> torch.Tensor:
    """Move logits to the columns of the tasks' own classes, with -inf for those that are not trained.

    Args:
        logits (`torch.Tensor`): (batch, classes), of the classes `shown` of each image's task.
        tasks (`Sequence[Task]`), shown (`Sequence[Sequence[str]]`): tasks, and names of classes, all trained ones too.
        rows (`torch.Tensor`): (batch,), number of each image's task among `tasks`.
    """
    places = []
    for task, names in zip(tasks, shown):
        place, trained = {name: number for number, name in enumerate(names)}, set(task.trained_classes)
        of_classes = [place[name] if name in trained else -1 for name in task.class_names]
        places.append(of_classes + [-1] * (logits.shape[1] - len(of_classes)))
    columns = on_device(places, rows.device)[rows]
    return logits.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, float("-inf"))


def task_losses(logits: torch.Tensor, labels: torch.Tensor, task_ids: torch.Tensor, tasks: int) -> torch.Tensor:
    """The part of each task in the mean loss of a batch, (tasks,): they add up to the loss."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return mean_by_task(losses, labels, task_ids, tasks)


def mean_by_task(losses: torch.Tensor, labels: torch.Tensor, task_ids: torch.Tensor, tasks: int) -> torch.Tensor:
    """The part of each task in the mean of the images' losses, (tasks,), without images that could not be read."""
    sums = losses.new_zeros(tasks).index_add(0, task_ids, losses.masked_fill(labels == IGNORE_INDEX, 0))
    # The minimum of 1 makes the loss 0, not NaN, if no image of the batch could be read.
    return sums / (labels != IGNORE_INDEX).sum().clamp(min=1)

"""What a classifier returns, and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .images import IGNORE_INDEX


@dataclass
class MultiTaskOutput(ModelOutput):
    """What `MultiTaskClassifier` returns.

    Args:
        loss (`torch.Tensor`, *optional*): cross entropy over each image's own classes, mean over the images.
        logits (`torch.Tensor`): (batch, classes of the task with most of them); -inf beyond an image's own classes.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Prediction(NamedTuple):
    """Classes of some images.

    Attributes:
        labels: the most probable class name of each image.
        probabilities: (images, classes of the task with most of them), in the order of the class names of each image's
            task; 0 beyond them.
    """

    labels: list[str]
    probabilities: torch.Tensor


def task_losses(logits: torch.Tensor, labels: torch.Tensor, task_ids: torch.Tensor, tasks: int) -> torch.Tensor:
    """The part of each task in the mean loss of a batch, (tasks,): they add up to the loss."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    sums = losses.new_zeros(tasks).index_add(0, task_ids, losses)
    # The minimum of 1 makes the loss 0, not NaN, if no image of the batch could be read.
    return sums / (labels != IGNORE_INDEX).sum().clamp(min=1)

"""Accuracies of tasks, and of the classes that are trained and the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import harmonic_mean

import numpy as np
import torch
from transformers import EvalPrediction

from ..tuner.devices import on_device
from .images import IGNORE_INDEX
from .task import Task


def predicted_classes(
    logits: torch.Tensor, label_ids: Sequence[torch.Tensor], tasks: Mapping[str, Task]
) -> torch.Tensor:
    """Numbers of the most probable classes, (images,).

    If a task has `classes_for_training`, (images, 2): the second is chosen among the classes that are trained if the
    true class is one of them, and else among the others, as in the evaluation from base to new classes (Zhou et al.,
    "Conditional Prompt Learning for Vision-Language Models", CVPR 2022, section 4.1).

    Args:
        logits (`torch.Tensor`): (images, classes).
        label_ids (`Sequence[torch.Tensor]`): numbers of the true classes and of the tasks, (images,) each.
        tasks (`Mapping[str, Task]`): the tasks, in the order of their numbers.
    """
    among_all = logits.argmax(-1)
    if all(task.trains_all_classes for task in tasks.values()):
        return among_all
    labels, task_ids = label_ids
    trained = torch.zeros(len(tasks), logits.shape[1], dtype=torch.bool)
    for row, task in zip(trained, tasks.values()):
        row[task.trained_numbers] = True
    trained = on_device(trained, logits.device)[task_ids]
    alike = trained == trained.gather(1, labels.clamp(min=0)[:, None])
    return torch.stack([among_all, logits.masked_fill(~alike, float("-inf")).argmax(-1)], dim=1)


def accuracies(prediction: EvalPrediction, tasks: Mapping[str, Task]) -> dict[str, float]:
    """`<adapter>_accuracy` of each task that has images, `mean_accuracy` and `worst_accuracy`, from 0 to 1.

    A task with `classes_for_training` also has `<adapter>_accuracy_base`, of images of the classes that are trained
    among these classes only, `<adapter>_accuracy_new`, of images of the others among these others only, and
    `<adapter>_accuracy_harmonic`, the harmonic mean of both. `mean_accuracy_base` and `mean_accuracy_new` are means
    over these tasks, and `mean_accuracy_harmonic` is the harmonic mean of these two.

    Args:
        prediction (`EvalPrediction`): what `predicted_classes` returns, and as `label_ids` the numbers of the true
            classes and of the tasks. With `eval_do_concat_batches=False`, lists of these by batch.
        tasks (`Mapping[str, Task]`): the tasks, in the order of their numbers.
    """
    predictions, label_ids = prediction.predictions, prediction.label_ids
    if isinstance(predictions, list):
        predictions, label_ids = np.concatenate(predictions), map(np.concatenate, zip(*label_ids))
    labels, task_ids = label_ids
    right = predictions.reshape(len(labels), -1) == np.asarray(labels)[:, None]
    metrics, parts = {}, {}
    for number, task in enumerate(tasks.values()):
        rows = (task_ids == number) & (labels != IGNORE_INDEX)
        if rows.any():
            metrics[f"{task.adapter}_accuracy"] = float(right[rows, 0].mean())
        if not task.trains_all_classes:
            base = np.isin(labels, task.trained_numbers)
            found = {"base": right[rows & base, -1], "new": right[rows & ~base, -1]}
            parts[task.adapter] = {part: float(each.mean()) for part, each in found.items() if len(each)}
    values = list(metrics.values())
    metrics |= {"mean_accuracy": float(np.mean(values)), "worst_accuracy": min(values)}
    by_part = {part: [each[part] for each in parts.values() if part in each] for part in ("base", "new")}
    parts["mean"] = {part: float(np.mean(values)) for part, values in by_part.items() if values}
    return metrics | _with_harmonic_means(parts)


def _with_harmonic_means(parts: dict[str, dict[str, float]]) -> dict[str, float]:
    """Metrics by name, given the accuracies on base and new classes of each adapter."""
    metrics = {}
    for adapter, by_part in parts.items():
        if len(by_part) == 2:
            by_part = {**by_part, "harmonic": harmonic_mean(by_part.values())}
        metrics |= {f"{adapter}_accuracy_{part}": value for part, value in by_part.items()}
    return metrics

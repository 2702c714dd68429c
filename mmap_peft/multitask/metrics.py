"""How well each task is classified."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from transformers import EvalPrediction

from .images import IGNORE_INDEX
from .task import Task


def accuracies(prediction: EvalPrediction, tasks: Mapping[str, Task]) -> dict[str, float]:
    """Accuracy of each task that has images, their mean, and the worst, all between 0 and 1.

    Args:
        prediction (`EvalPrediction`): numbers of the predicted classes, (images,); as `label_ids` those of the true
            classes and of the tasks. With `eval_do_concat_batches=False`, a list of these, one a batch.
        tasks (`Mapping[str, Task]`): the tasks, in the order of their numbers.

    Returns:
        `<adapter>_accuracy` of each task, `mean_accuracy` and `worst_accuracy`.
    """
    predictions, label_ids = prediction.predictions, prediction.label_ids
    if isinstance(predictions, list):
        predictions, label_ids = np.concatenate(predictions), map(np.concatenate, zip(*label_ids))
    labels, task_ids = label_ids
    metrics = {}
    for number, task in enumerate(tasks.values()):
        rows = (task_ids == number) & (labels != IGNORE_INDEX)
        if rows.any():
            metrics[f"{task.adapter}_accuracy"] = float((predictions[rows] == labels[rows]).mean())
    values = list(metrics.values())
    return {**metrics, "mean_accuracy": float(np.mean(values)), "worst_accuracy": min(values)}

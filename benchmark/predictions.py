"""Predictions of all test images of a run, in a parquet file."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import EvalPrediction

from mmap_peft.multitask.files import replace_file
from mmap_peft.multitask.images import IGNORE_INDEX
from mmap_peft.multitask.metrics import accuracies, predicted_classes
from mmap_peft.multitask.task import Task
from mmap_peft.multitask.task_trainer import TaskTrainer

from .paired import pack


FOLDER = "predictions"
SCHEMA = pa.schema(
    {
        "task": pa.string(),
        "image": pa.string(),
        "true": pa.string(),
        "predicted": pa.string(),
        "probability_true": pa.float32(),
        "probability_predicted": pa.float32(),
    }
)


def predict(trainer: TaskTrainer) -> tuple[dict[str, float], pa.Table]:
    """Predict the test images of all tasks.

    Returns:
        The metrics of `TaskTrainer.predict`; and a table with a row for each image that could be read: task, image
        (its `file`, or its number), names of the true and of the predicted class, and their probabilities.
    """
    tasks, kept = trainer.model.tasks, (trainer.preprocess_logits_for_metrics, trainer.compute_metrics)
    trainer.preprocess_logits_for_metrics = partial(_with_probabilities, tasks=tasks)
    trainer.compute_metrics = lambda found: accuracies(EvalPrediction(found.predictions[0], found.label_ids), tasks)
    try:
        output = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    finally:
        trainer.preprocess_logits_for_metrics, trainer.compute_metrics = kept
    labels, task_ids = output.label_ids
    parts = []
    for number, task in enumerate(tasks.values()):
        rows = np.flatnonzero(task_ids == number)
        rows, images = rows[labels[rows] != IGNORE_INDEX], image_names(task)[labels[rows] != IGNORE_INDEX]
        predicted, of_predicted, of_true = (values[rows] for values in output.predictions)
        predicted = predicted.reshape(len(rows), -1)[:, 0]
        names = np.array(task.class_names, dtype=object)
        columns = [[task.adapter] * len(rows), images, names[labels[rows]], names[predicted], of_true, of_predicted]
        parts.append(pa.table(dict(zip(SCHEMA.names, columns)), SCHEMA))
    return output.metrics, pa.concat_tables(parts)


def _with_probabilities(
    logits: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor], tasks: Mapping[str, Task]
) -> tuple[torch.Tensor, ...]:
    """`predicted_classes` of each image, the probability of the most probable class, and that of the true class."""
    probabilities = logits.float().softmax(-1)
    pairs = torch.stack([logits.argmax(-1), labels[0].clamp(min=0)], dim=1)
    return (predicted_classes(logits, labels, tasks), *probabilities.gather(1, pairs).unbind(1))


def image_names(task: Task) -> np.ndarray:
    """The `file` of each test image of a task, or its number."""
    names = task.eval["file"][:] if "file" in getattr(task.eval, "column_names", ()) else range(len(task.eval))
    return np.array([str(name) for name in names], dtype=object)


def correct(table: pa.Table) -> dict[str, str]:
    """By task, a bit for each test image, 1 if its class was predicted; hexadecimal."""
    tasks, right = table["task"].to_numpy(), table["true"].to_numpy() == table["predicted"].to_numpy()
    return {task: pack(right[tasks == task]) for task in dict.fromkeys(tasks)}


def accuracy_by_task(table: pa.Table) -> dict[str, float]:
    """The accuracy of each task of a table of predictions."""
    tasks, right = table["task"].to_numpy(), table["true"].to_numpy() == table["predicted"].to_numpy()
    return {task: float(right[tasks == task].mean()) for task in dict.fromkeys(tasks)}


def predictions_path(folder: str | os.PathLike, name: str) -> Path:
    """The file of a run's predictions.

    Args:
        folder: the study's folder of results.
        name (`str`): `Run.name`.

    Raises:
        ValueError: the name has a part that is no name of a file, such as `..`.
    """
    if not all(re.fullmatch(r"\w[\w.-]*", part) for part in name.split("/")):
        raise ValueError(
            f"Run {name!r} is to name a file; its parts, between '/', need letters, digits, '_', '-' and '.' only, "
            "and begin with none of the last two."
        )
    return Path(folder) / FOLDER / f"{name}.parquet"


def keep_predictions(source: Path, folder: str | os.PathLike, name: str) -> None:
    """Copy a file of predictions into the study's folder of results, whose arguments are as for `predictions_path`."""
    path = predictions_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as new:
        shutil.copyfile(source, new)


def read_predictions(folder: str | os.PathLike, name: str, result: dict[str, Any]) -> pa.Table | None:
    """The predictions of a run, or `None` if there are none, or those of another training than the result.

    Args:
        folder, name: as for `predictions_path`.
        result (`dict`): the run's line of results.

    Raises:
        ValueError: the file is no table of predictions.
    """
    path = predictions_path(folder, name)
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is no parquet file that can be read ({error}); remove it.") from error
    if table.schema.remove_metadata() != SCHEMA:
        raise ValueError(f"{path} has the columns {table.column_names}, not {SCHEMA.names}; remove it.")
    return table if correct(table) == result.get("correct") else None

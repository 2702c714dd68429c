"""Predicts the evaluation images of a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from transformers import EvalPrediction

from ..checking import Count, checked
from ..data.folders import short, spelling
from ..data.splits import Split, has_split, rows_of_split, split_of_folders
from ..multitask.class_names import clean_name
from ..multitask.classifier import MultiTaskClassifier
from ..multitask.images import IGNORE_INDEX, TaskImages
from ..multitask.metrics import accuracies, predicted_classes
from ..multitask.task import Task


@dataclass
class MeasuringArguments:
    """Arguments of the commands that measure accuracies."""

    batch_size: int = field(default=64, metadata={"help": "images that are computed at a time"})
    unreadable: str = field(
        default="refuse",
        metadata={"help": "what to do with files that are no images", "choices": ["refuse", "skip"]},
    )

    def __post_init__(self) -> None:
        checked(self.batch_size, Count, "batch_size")


@dataclass
class Found:
    """Predictions of images.

    Attributes:
        predicted, labels, task_ids (`np.ndarray`): (images,), numbers of the predicted and of the true class, -100 if
            an image could not be read, and of the task.
        probability (`np.ndarray`): (images,), the probability of the predicted class.
    """

    predicted: np.ndarray
    labels: np.ndarray
    task_ids: np.ndarray
    probability: np.ndarray

    def accuracies(self, tasks: Mapping[str, Task]) -> dict[str, float]:
        """As `MultiTaskTrainer.evaluate`, without a prefix."""
        return accuracies(EvalPrediction(self.predicted, (self.labels, self.task_ids)), tasks)


def give_images(
    classifier: MultiTaskClassifier, domains: Mapping[str, Dataset], split: Split | None, task: str | None = None
) -> str:
    """Give the tasks of a classifier, by the domains' names, the images to evaluate on.

    Args:
        classifier (`MultiTaskClassifier`): its tasks lose all other images.
        domains: as `read_data` returns them.
        split (`Split`, *optional*): the images that training held out, which are used if the data hold all of them.
        task (`str`, *optional*): the task of all images, whatever their domain is called.

    Returns:
        Which images these are, in words.

    Raises:
        ValueError: a domain is no task of the classifier, or has a class that the task lacks.
    """
    chosen, which = _evaluation_rows(domains, split)
    if task is not None:
        classifier.check_task(task)
    for each in classifier.tasks.values():
        each.train = each.eval = None
    for domain, data in chosen.items():
        known = _task_of(classifier, domain, len(chosen)) if task is None else classifier.tasks[task]
        names = [clean_name(name) for name in data.features["label"].names]
        missing = [name for name in names if name not in known.class_names]
        if missing:
            raise ValueError(
                f"{short(domain)} has the class {short(missing[0])}, which task {short(known.name)} lacks; it has "
                f"{', '.join(known.class_names)[:300]}."
            )
        images = data.select_columns(["image", "file", "label"])
        if names != known.class_names:
            numbers = np.array([known.class_names.index(name) for name in names])
            numbers = numbers[data.with_format("numpy")["label"][:]]
            label = ClassLabel(names=known.class_names)
            images = images.remove_columns("label").add_column("label", numbers, feature=label)
        known.eval = images if known.eval is None else concatenate_datasets([known.eval, images])
    return which


def _evaluation_rows(domains: Mapping[str, Dataset], split: Split | None) -> tuple[dict[str, Dataset], str]:
    for source, which in ((split, "the images that training held out"), (None, "the test images of the folders")):
        if source is None and not has_split(domains):
            continue
        try:
            rows = rows_of_split(domains, source or split_of_folders(domains))
        except ValueError:  # other images than those of the training
            continue
        return {name: data.select(parts["eval"]) for name, (data, parts) in rows.items()}, which
    return dict(domains), "all images, since nothing says which of them did not train"


def _task_of(classifier: MultiTaskClassifier, domain: str, domains: int) -> Task:
    for task in classifier.tasks.values():
        if spelling(domain) == spelling(task.name):
            return task
    if domains == len(classifier.tasks) == 1:  # the folder has another name now
        return next(iter(classifier.tasks.values()))
    raise ValueError(
        f"The model has no task {short(domain)}; write --task with one of {', '.join(classifier.tasks)}, to which all "
        "images belong then."
    )


@torch.no_grad()
def measure(classifier: MultiTaskClassifier, how: MeasuringArguments, title: str = "Images") -> Found:
    """Predict the evaluation images of a classifier's tasks.

    Args:
        classifier (`MultiTaskClassifier`): a classifier whose tasks have evaluation images.
        how (`MeasuringArguments`): the size of batches, and what to do with unreadable files.
        title (`str`): of the progress bar.

    Raises:
        ValueError: no image can be read, or one cannot and `unreadable` is `"refuse"`.
    """
    images = TaskImages(
        list(classifier.tasks.values()), "eval", classifier.processor.image_processor, how.unreadable, None, 0
    )
    parts = []
    with classifier.evaluating():
        for batch in images.batches(range(len(images)), how.batch_size, title):
            task_ids = batch["task_ids"].to(classifier.device)
            logits = classifier(batch["pixel_values"].to(classifier.device), task_ids).logits
            predicted = predicted_classes(logits, (batch["labels"].to(logits.device), task_ids), classifier.tasks)
            best = logits.float().softmax(-1).amax(-1)
            parts.append([part.cpu().numpy() for part in (predicted, batch["labels"], task_ids, best)])
    if not parts or all((labels == IGNORE_INDEX).all() for _, labels, *_ in parts):
        raise ValueError("There is no image to evaluate on that can be read; give other data.")
    return Found(*(np.concatenate(each) for each in zip(*parts)))

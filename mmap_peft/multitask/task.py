"""A task: a name, class names, their texts, and images to train and to evaluate on."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np


logger = logging.getLogger(__name__)

DEFAULT_TEMPLATE = "a photo of a {}."
LONGEST_NAME = 200  # bytes of an adapter's name: a file system takes 255, endings included


def clean_name(name: str) -> str:
    """A class name in plain words: `"Alarm_Clock"` becomes `"alarm clock"`."""
    return re.sub(r"[\s_\-]+", " ", name).strip().lower()


def adapter_name(task_name: str) -> str:
    """The name of a task's adapter and of its folder: `"Real World"` becomes `"real_world"`.

    Letters and digits of all scripts are kept, in one spelling of Unicode. Marks and invisible characters are not.

    Raises:
        ValueError: the name is too long for a folder, or is no text that can be written.
    """
    if any(unicodedata.category(each) == "Cs" for each in task_name):
        raise ValueError(f"Invalid value {task_name[:40]!r} for `name` of a task: it holds half of a character.")
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", task_name).casefold())
    visible = "".join(each for each in folded if unicodedata.category(each) not in ("Mn", "Mc", "Me", "Cf"))
    name = re.sub(r"[\W_]+", "_", visible).strip("_")
    size = len(name.encode())
    if size > LONGEST_NAME:
        raise ValueError(
            f"Invalid value {task_name[:40]!r}... for `name` of a task: a folder of {size} bytes would be named after "
            f"it; write a name of at most {LONGEST_NAME} letters, or fewer if they are not ASCII."
        )
    return name


def as_tuple(texts: str | Sequence[str]) -> tuple[str, ...]:
    """One text or several, as a tuple."""
    return (texts,) if isinstance(texts, str) else tuple(texts)


@dataclass
class Task:
    """One visual task for the frozen CLIP.

    Args:
        name (`str`): for example `"art"`. The task's adapter has the same name, in lower case and with `_` for all
            other characters than letters and digits of any script.
        class_names (`Sequence[str]`): names of the classes, in the order of the labels. They are cleaned:
            `"Alarm_Clock"` becomes `"alarm clock"`.
        train, eval (`datasets.Dataset`, *optional*): images with the columns `image` (an image, a path, or the
            undecoded image of `datasets`) and `label` (number of the class), or any sequence of such rows.
        template (`str` or a sequence of them): text of a class, with `{}` for its name. Features of several texts are
            averaged.
        class_texts (`Mapping[str, str | Sequence[str]]`, *optional*): texts of some classes, instead of the template.
        dataset (`str`, *optional*): id on the Hub of the data set that the images come from, or its name, for the
            model card.

    Raises:
        ValueError: fewer than two classes, names that are the same after cleaning, a template without `{}`, texts for
            an unknown class, or labels that do not fit the class names.
    """

    name: str
    class_names: Sequence[str]
    train: Any = None
    eval: Any = None
    template: str | Sequence[str] = DEFAULT_TEMPLATE
    class_texts: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    dataset: str | None = None

    def __post_init__(self) -> None:
        if not adapter_name(self.name):
            raise ValueError(f"Invalid task name {self.name!r}, of which no adapter name is left; write letters.")
        raw, self.class_names = list(self.class_names), [clean_name(name) for name in self.class_names]
        if len(raw) < 2:
            raise ValueError(f"Task {self.name!r} has {len(raw)} class; give two or more.")
        counts = Counter(self.class_names)
        clash = ", ".join(repr(name) for name in raw if counts[clean_name(name)] > 1 or not clean_name(name))
        if clash:
            raise ValueError(
                f"Class names of task {self.name!r} are the same or empty after cleaning: {clash}; rename them."
            )
        for text in as_tuple(self.template):
            if text.count("{}") != 1:
                raise ValueError(f"Template {text!r} of task {self.name!r} must hold {{}} once, for the class name.")
        self.class_texts = {clean_name(name): texts for name, texts in self.class_texts.items()}
        for name in self.class_texts:
            if name not in self.class_names:
                raise ValueError(f"Task {self.name!r} has texts for {name!r}, which is none of its classes.")
        for split in ("train", "eval"):
            if getattr(self, split) is not None:
                self._check_labels(split)

    @property
    def adapter(self) -> str:
        """Name of the task's adapter."""
        return adapter_name(self.name)

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The texts of each class."""
        filled = {name: tuple(text.format(name) for text in as_tuple(self.template)) for name in self.class_names}
        return [as_tuple(self.class_texts.get(name, texts)) for name, texts in filled.items()]

    def labels(self, split: str) -> np.ndarray:
        """Labels of all images of `"train"` or `"eval"`, without decoding an image."""
        data = getattr(self, split)
        is_dataset = isinstance(data, datasets.Dataset)
        labels = data.with_format("numpy")["label"] if is_dataset else [row["label"] for row in data]
        return np.asarray(labels, dtype=np.int64)

    def check_training_images(self) -> None:
        """Raise a `ValueError` if the task has no image to train on, and warn of classes that have none."""
        if self.train is None or not len(self.train):
            raise ValueError(f"Task {self.name!r} has no training images; give Task(..., train=...).")
        counts = np.bincount(self.labels("train"), minlength=len(self.class_names))
        missing = [repr(name) for name, count in zip(self.class_names, counts) if not count]
        if missing:
            logger.warning(
                "Task %r has no training image of %s%s; they are predicted by their texts only.",
                self.name,
                ", ".join(missing[:10]),
                f" and {len(missing) - 10} more classes" if len(missing) > 10 else "",
            )

    def _check_labels(self, split: str) -> None:
        labels = self.labels(split)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise ValueError(
                f"Labels of task {self.name!r} run from {labels.min()} to {labels.max()}, but it has "
                f"{len(self.class_names)} class names, numbered from 0."
            )
        feature = getattr(getattr(self, split), "features", {}).get("label")
        if isinstance(feature, datasets.ClassLabel):
            names = [clean_name(name) for name in feature.names]
            if names != self.class_names:
                raise ValueError(
                    f"Labels of task {self.name!r} stand for {names[:3]}... in its {split} images, but class_names "
                    f"begins with {self.class_names[:3]}; give them in the same order."
                )

"""A task: a name, class names, their texts, and images to train and to evaluate on."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Annotated, Any

import datasets
import numpy as np
from annotated_types import MinLen
from pydantic import AfterValidator

from ..checking import checked, shortened
from .class_names import clean_name
from .rows import LABEL_COLUMNS, Rows, as_rows


logger = logging.getLogger(__name__)

DEFAULT_TEMPLATE = "a photo of a {}."
LONGEST_NAME = 200  # bytes of an adapter's name: a file system takes 255, endings included


def _whole(text: str) -> str:
    if any(unicodedata.category(each) == "Cs" for each in text):
        raise ValueError("it holds half of a character")
    return text


Text = Annotated[str, AfterValidator(_whole)]
Texts = Text | Annotated[list[Text], MinLen(1)] | Annotated[tuple[Text, ...], MinLen(1)]


def adapter_name(task_name: str) -> str:
    """The name of a task's adapter and of its folder: `"Real World"` becomes `"real_world"`.

    Letters and digits of all scripts are kept, in one spelling of Unicode. Marks and invisible characters are not.

    Raises:
        ValueError: the name is too long for a folder, or is no text that can be written.
    """
    try:
        _whole(task_name)
    except ValueError as error:
        raise ValueError(f"Invalid value {task_name[:40]!r} for `name` of a task: {error}.") from None
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
        train, eval (*optional*): images with labels: a `datasets.Dataset` or `DatasetDict` (its split `train`, or
            `validation` or `test`), a list or sequence of rows `{"image": ..., "label": ...}` or of pairs
            (image, label), such as a torchvision data set, two lists (images, labels), a dictionary of two columns, or
            a pandas frame. An image has any form that [`MultiTaskClassifier.predict`] takes. A label is the number of
            a class or its name. Columns can have the names in `IMAGE_COLUMNS` and `LABEL_COLUMNS` of `rows.py`.

            Labels are checked here, without decoding an image. Those of a sequence of your own, without `.targets`,
            are read together with the images when training starts. What a sequence of your own or a data set with
            `set_transform` returns is asked for at each visit, so it can be another image every time.
        template (`str` or a sequence of them): text of a class, with `{}` for its name. Features of several texts are
            averaged.
        class_texts (`Mapping[str, str | Sequence[str]]`, *optional*): texts of some classes, instead of the template.
        dataset (`str`, *optional*): id on the Hub of the data set that the images come from, or its name, for the
            model card.

    If the labels of a `datasets.Dataset` have other names than the task, such as codes, their numbers count. The names
    must not be among the task's then, and as many.

    Raises:
        ValueError: a value of another type, fewer than two classes, names that are the same after cleaning, a template
            without `{}`, texts for an unknown class, images in a form that cannot be read, or labels that do not fit
            the class names.
    """

    name: str
    class_names: Sequence[str]
    train: Any = None
    eval: Any = None
    template: str | Sequence[str] = DEFAULT_TEMPLATE
    class_texts: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    dataset: str | None = None

    def __post_init__(self) -> None:
        checked(self.name, str, "name")
        if not adapter_name(self.name):
            raise ValueError(
                f"Invalid task name {shortened(self.name)}, of which no adapter name is left; write letters."
            )
        self._check_class_names()
        self._check_texts()
        self._checked("dataset", Text | None)
        for split in ("train", "eval"):
            if getattr(self, split) is not None:
                setattr(self, split, as_rows(getattr(self, split), split, self._where(split)))
                self._check_labels(split)

    def _checked(self, name: str, kind: Any, instead: str = "") -> Any:
        try:
            return checked(getattr(self, name), kind, name, instead)
        except ValueError as error:
            raise ValueError(f"Task {shortened(self.name)}: {error}") from None

    def _where(self, split: str) -> str:
        return f"{split} images of task {shortened(self.name)}"

    def _check_class_names(self) -> None:
        if not isinstance(self.class_names, str | bytes | Mapping | Set):
            names = self.class_names
            self.class_names = names.tolist() if hasattr(names, "tolist") else _listed(names)
        raw = self._checked("class_names", list[Text], "expected a list of strings, in the order of the labels")
        self.class_names = [clean_name(name) for name in raw]
        if len(raw) < 2:
            raise ValueError(f"Task {shortened(self.name)} has {len(raw)} class; give two or more.")
        counts = Counter(self.class_names)
        clash = [
            raw_name for raw_name, name in zip(raw, self.class_names) if counts[name] > 1 or not _is_visible(name)
        ]
        if clash:
            names = ", ".join(map(shortened, clash[:3])) + (f" and {len(clash) - 3} more" if len(clash) > 3 else "")
            raise ValueError(
                f"Class names of task {shortened(self.name)} are the same or empty after cleaning: {names}; rename "
                "them."
            )

    def _check_texts(self) -> None:
        self._checked("template", Texts, "expected a string with {} for the class name, or a list of them")
        for text in as_tuple(self.template):
            if text.count("{}") != 1 or set("{}") & set(text.replace("{}", "")):
                raise ValueError(
                    f"Template {shortened(text)} of task {shortened(self.name)} must hold {{}} once, for the class "
                    "name, and no other braces."
                )
        if isinstance(self.class_texts, Mapping):
            self.class_texts = dict(self.class_texts)
        self._checked("class_texts", dict[str, Texts], "expected a dictionary with a text, or a list of them")
        cleaned = {clean_name(name): texts for name, texts in self.class_texts.items()}
        if len(cleaned) < len(self.class_texts):
            raise ValueError(
                f"Task {shortened(self.name)}: `class_texts` has one class twice, in two spellings; remove one."
            )
        self.class_texts = cleaned
        for name in self.class_texts:
            if name not in self.class_names:
                raise ValueError(
                    f"Task {shortened(self.name)} has texts for {shortened(name)}, which is none of its classes."
                )

    @property
    def adapter(self) -> str:
        """Name of the task's adapter."""
        return adapter_name(self.name)

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The texts of each class."""
        filled = {
            name: tuple(text.replace("{}", name) for text in as_tuple(self.template)) for name in self.class_names
        }
        return [as_tuple(self.class_texts.get(name, texts)) for name, texts in filled.items()]

    def rows(self, split: str) -> Rows:
        """The images of `"train"` or `"eval"`, with labels as numbers."""
        data = getattr(self, split)
        return Rows([] if data is None else data, self.class_names, self._where(split))

    def labels(self, split: str) -> np.ndarray:
        """Labels of all images of `"train"` or `"eval"`, without decoding an image if they are known without."""
        return self.rows(split).all_labels()

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
        self.rows(split)  # checks the labels
        data = getattr(self, split)
        features = data.features if isinstance(data, datasets.Dataset) else {}
        feature = features.get(next((name for name in LABEL_COLUMNS if name in features), None))
        if isinstance(feature, datasets.ClassLabel):
            names = [clean_name(name) for name in feature.names]
            codes = len(names) == len(self.class_names) and not set(names) & set(self.class_names)
            if names != self.class_names and not codes:
                raise ValueError(
                    f"Labels of task {shortened(self.name)} are {shortened(names[:3])}... in its {split} images, "
                    f"but class_names begins with {shortened(self.class_names[:3])}; give them in the same order."
                )


def _listed(names: Any) -> Any:
    return list(names) if isinstance(names, Iterable) else names


def _is_visible(name: str) -> bool:
    return any(each.isprintable() and not each.isspace() for each in name)

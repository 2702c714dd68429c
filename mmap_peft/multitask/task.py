"""A task: a name, class names, their texts, and images to train and to evaluate on."""

from __future__ import annotations

import copy
import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from ..checking import checked, shortened
from .class_names import Text, Texts, as_list, as_tuple, check_template, clean_name, clean_names, whole
from .rows import LABEL_COLUMNS, Rows, as_rows


logger = logging.getLogger(__name__)

DEFAULT_TEMPLATE = "a photo of a {}."
LONGEST_NAME = 200  # bytes of an adapter's name: a file system takes 255, endings included


def adapter_name(task_name: str) -> str:
    """The name of a task's adapter and of its folder: `"Real World"` becomes `"real_world"`.

    Letters and digits of all scripts are kept, in one spelling of Unicode. Marks and invisible characters are not.

    Raises:
        ValueError: the name is too long for a folder, or is no text that can be written.
    """
    try:
        whole(task_name)
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
        classes_for_training (`Sequence[str]`, *optional*): the classes that are trained, two or more of `class_names`.
            The loss is a softmax over these only, and images of other classes among `train` are left out of all that
            uses training images: training, snapshots of gradients, prototypes and the search for the nearest group.
            Evaluation and prediction are over all `class_names`. `None`: all of them.

    If the labels of a `datasets.Dataset` have other names than the task, such as codes, their numbers count. The names
    must not be among the task's then, and as many.

    Raises:
        ValueError: a value of another type, fewer than two classes, names that are the same after cleaning, a template
            without `{}`, texts for an unknown class, unknown or repeated `classes_for_training`, images in a form that
            cannot be read, or labels that do not fit the class names.
    """

    name: str
    class_names: Sequence[str]
    train: Any = None
    eval: Any = None
    template: str | Sequence[str] = DEFAULT_TEMPLATE
    class_texts: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    dataset: str | None = None
    classes_for_training: Sequence[str] | None = None

    def __post_init__(self) -> None:
        checked(self.name, str, "name")
        if not adapter_name(self.name):
            raise ValueError(
                f"Invalid task name {shortened(self.name)}, of which no adapter name is left; write letters."
            )
        self.class_names = self._clean_names("class_names", "Class names", ", in the order of the labels")
        self._check_texts()
        self._check_classes_for_training()
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

    def _clean_names(self, field: str, source: str, order: str = "") -> list[str]:
        """The names of classes in a field, in plain words."""
        setattr(self, field, as_list(getattr(self, field)))
        raw = self._checked(field, list[Text], f"expected a list of strings{order}")
        if len(raw) < 2:
            inside = "" if field == "class_names" else f" in `{field}`"
            raise ValueError(f"Task {shortened(self.name)} has {len(raw)} class{inside}; give two or more.")
        return clean_names(raw, f"{source} of task {shortened(self.name)}")

    def _check_classes_for_training(self) -> None:
        if self.classes_for_training is None:
            return
        self.classes_for_training = self._clean_names("classes_for_training", "Names in `classes_for_training`")
        unknown = [name for name in self.classes_for_training if name not in self.class_names]
        if unknown:
            raise ValueError(
                f"Task {shortened(self.name)} has {shortened(unknown[0])} in `classes_for_training`, which is none of "
                "its classes; choose from class_names."
            )

    def _check_texts(self) -> None:
        self._checked("template", Texts, "expected a string with {} for the class name, or a list of them")
        for text in as_tuple(self.template):
            check_template(text, f" of task {shortened(self.name)}")
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

    @property
    def trained_classes(self) -> list[str]:
        """The classes that are trained, in the order of `class_names`."""
        chosen = set(self.class_names if self.classes_for_training is None else self.classes_for_training)
        return [name for name in self.class_names if name in chosen]

    @property
    def trained_numbers(self) -> list[int]:
        """The numbers of the classes that are trained."""
        chosen = set(self.trained_classes)
        return [number for number, name in enumerate(self.class_names) if name in chosen]

    @property
    def trains_all_classes(self) -> bool:
        """Whether all classes are trained."""
        return self.classes_for_training is None or len(self.classes_for_training) == len(self.class_names)

    def with_classes(self, class_names: Sequence[str] | None = None, templates: Sequence[str] | None = None) -> Task:
        """A copy without images, with other classes, whose names are clean, or with other templates, which then are
        used for all classes, also those with `class_texts`."""
        other = copy.copy(self)
        other.train = other.eval = other.classes_for_training = None
        if class_names is not None:
            other.class_names = list(class_names)
        if templates is not None:
            other.template, other.class_texts = tuple(templates), {}
        return other

    def rows(self, split: str) -> Rows:
        """The images of `"train"`, those of `trained_classes`, or of `"eval"`, with labels as numbers."""
        data = getattr(self, split)
        only = None if split == "eval" or self.trains_all_classes else self.trained_numbers
        return Rows([] if data is None else data, self.class_names, self._where(split), only)

    def labels(self, split: str) -> np.ndarray:
        """Labels of all images of `"train"` or `"eval"`, without decoding an image if they are known without."""
        return self.rows(split).all_labels()

    def check_training_images(self) -> None:
        """Raise a `ValueError` if the task has no image to train on, and warn of classes that have none."""
        if self.train is None or not len(self.train):
            raise ValueError(f"Task {self.name!r} has no training images; give Task(..., train=...).")
        counts = np.bincount(self.labels("train"), minlength=len(self.class_names))
        if not counts.any():
            raise ValueError(
                f"Task {self.name!r} has training images, but none of its classes_for_training; images of other "
                "classes are left out, so give images of these."
            )
        missing = [repr(self.class_names[number]) for number in self.trained_numbers if not counts[number]]
        if missing:
            logger.warning(
                "Task %r has no training image of %s%s; a linear probe or the cache of a Tip-Adapter will hardly ever "
                "predict them, prompts can by their texts.",
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

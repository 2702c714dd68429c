"""What people give as training or evaluation images, as rows with an image and the number of its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Subset

from ..checking import shortened
from .class_names import clean_name


# Names of columns, the first that is there is used.
IMAGE_COLUMNS = ("image", "img", "picture", "image_path", "path", "file", "images")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
# Splits of a `datasets.DatasetDict` that are used.
SPLITS = {"train": ("train", "training"), "eval": ("validation", "val", "valid", "eval", "test")}

_FORMS = (
    "give a datasets.Dataset or a list of rows such as {'image': path, 'label': number}, pairs (image, label), or "
    "(images, labels)"
)


def column(names: Any, known: Sequence[str], where: str) -> str:
    """The first of the known column names that there is, or a `ValueError`."""
    found = next((name for name in known if name in names), None)
    if found is None:
        raise ValueError(
            f"The {where} have the columns {shortened(list(names))}, but none of {', '.join(known)}; rename one."
        )
    return found


def as_rows(data: Any, split: str, where: str) -> Any:
    """A `datasets.Dataset`, or a sequence of rows or pairs, of what was given as `train` or `eval` of a task.

    Raises:
        ValueError: it is none of the forms that `Task` names, such as a stream.
    """
    if isinstance(data, Mapping) and data and all(isinstance(each, datasets.Dataset) for each in data.values()):
        names = [name for name in SPLITS[split] if name in data]
        if len(names) != 1:
            raise ValueError(
                f"The {where} are a DatasetDict with the splits {shortened(list(data))}, of which "
                f"{len(names) or 'none'} can be meant; choose one, such as {split}=data[{next(iter(data))!r}]."
            )
        return data[names[0]]
    if isinstance(data, datasets.Dataset):
        return data
    columns = None
    if hasattr(data, "columns") and hasattr(data, "iloc"):  # a frame of pandas
        columns = {name: data[name].tolist() for name in data.columns}
    elif isinstance(data, Mapping) and data and not isinstance(data, datasets.IterableDatasetDict):
        columns = data
    if columns is not None:
        data = columns[column(columns, IMAGE_COLUMNS, where)], columns[column(columns, LABEL_COLUMNS, where)]
    if isinstance(data, tuple) and len(data) == 2 and not any(isinstance(each, tuple | Mapping) for each in data):
        return _paired(*data, where)
    readable = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, str | bytes | Mapping) or hasattr(data, "__array__") or not readable:
        raise ValueError(
            f"The {where} are {shortened(data)}, no rows that can be counted and read in any order; {_FORMS}: list() "
            "of a generator, load_dataset() without streaming, read_folder() of a folder."
        )
    return data


def _paired(images: Any, labels: Any, where: str) -> list[dict[str, Any]]:
    if any(isinstance(each, str | bytes) or not hasattr(each, "__len__") for each in (images, labels)):
        raise ValueError(f"The {where} are {shortened((images, labels))}; {_FORMS}.")
    if len(images) != len(labels):
        raise ValueError(f"The {where} are {len(images)} images with {len(labels)} labels; give a label for each.")
    return [{"image": image, "label": label} for image, label in zip(images, labels)]


class Rows:
    """Reads what [`as_rows`] returns.

    Args:
        data, class_names, where: the data, names of the classes, and words for errors.
        only (`Sequence[int]`, *optional*): numbers of the classes whose rows are used; all rows if not given. Labels
            that are only known together with the images are then read, with all images, when rows are first counted.

    Attributes:
        stored (`bool`): the rows are the same at each visit: a list, or a data set without a transform.
        labels (`np.ndarray` or `None`): numbers of the classes; `None` if they are only known together with the
            images, as in a sequence of a user's own.
    """

    def __init__(self, data: Any, class_names: Sequence[str], where: str, only: Sequence[int] | None = None) -> None:
        self.data, self.class_names, self.where, self._only = data, class_names, where, only
        self._number_of = {name: number for number, name in enumerate(class_names)}
        self.stored, self.image, self.files = type(data) in (list, tuple), None, None
        if isinstance(data, datasets.Dataset):
            self.stored = data.format["type"] != "custom"
            plain = data.with_format(None)
            label = column(data.column_names, LABEL_COLUMNS, where)
            image = next((name for name in IMAGE_COLUMNS if name in data.column_names), None)
            if image:
                # Decoded here and not by `datasets`, so that an error can name the file.
                undecoded = isinstance(data.features[image], datasets.Image)
                images = plain.select_columns([image])
                self.files = images.cast_column(image, datasets.Image(decode=False)) if undecoded else images
            if self.stored and image:
                self.data, self.image = self.files, image
            numbers = plain.with_format("numpy")[label][:]
            self._known = self._numbers(numbers if numbers.dtype.kind in "iu" else plain[label][:])
        else:
            known = self._targets(data)
            self._known = None if known is None else self._numbers(known)

    @cached_property
    def labels(self) -> np.ndarray | None:
        return self._known if self._known is None or self._chosen is None else self._known[self._chosen]

    @cached_property
    def _chosen(self) -> np.ndarray | None:
        """Which rows of the data are used; `None` for all of them."""
        return None if self._only is None else np.flatnonzero(np.isin(self._labels_of_data(), self._only))

    def __len__(self) -> int:
        return len(self.data) if self._chosen is None else len(self._chosen)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        """The image, in any form, and the number of its class."""
        row = self.data[self._place(number)]
        if self.image is not None:
            return row[self.image], int(self.labels[number])
        image, label = self._parts(row, self.labels is None)
        return image, int(self._numbers([label])[0] if self.labels is None else self.labels[number])

    def file(self, number: int) -> Any:
        """What is known of an image whose row cannot be read: the path in a data set with a transform, or `None`."""
        return None if self.files is None else next(iter(self.files[self._place(number)].values()))

    def all_labels(self) -> np.ndarray:
        """Numbers of all classes; images are decoded if they are not known otherwise."""
        labels = self._labels_of_data()
        return labels if self._chosen is None else labels[self._chosen]

    def _place(self, number: int) -> int:
        return number if self._chosen is None else int(self._chosen[number])

    def _labels_of_data(self) -> np.ndarray:
        if self._known is not None:
            return self._known
        return self._numbers([self._parts(self.data[number])[1] for number in range(len(self.data))])

    def _parts(self, row: Any, with_label: bool = True) -> tuple[Any, Any]:
        if isinstance(row, Mapping):
            label = row[column(row, LABEL_COLUMNS, f"rows of {self.where}")] if with_label else None
            return row[column(row, IMAGE_COLUMNS, f"rows of {self.where}")], label
        if isinstance(row, tuple | list) and len(row) == 2:
            return row[0], row[1]
        raise ValueError(f"A row of the {self.where} is {shortened(row)}; {_FORMS}.")

    def _numbers(self, labels: Any) -> np.ndarray:
        """Labels as numbers of classes, or a `ValueError`."""
        if not (isinstance(labels, np.ndarray) and labels.dtype.kind in "iu" and labels.ndim == 1):
            labels = [self._number(label) for label in labels]
        if len(labels):
            low, high = (labels.min(), labels.max()) if isinstance(labels, np.ndarray) else (min(labels), max(labels))
            if low < 0 or high >= len(self.class_names):
                raise ValueError(
                    f"Labels of the {self.where} run from {shortened(int(low))} to {shortened(int(high))}, but it has "
                    f"{len(self.class_names)} class names, numbered from 0."
                )
        return np.asarray(labels, dtype=np.int64)

    def _number(self, label: Any) -> int:
        value = label
        if isinstance(value, str):
            value = self._number_of.get(clean_name(value))
        elif hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)):
            value = value.item()
        if type(value) is not int:
            raise ValueError(
                f"Invalid label {shortened(label)} of the {self.where}: expected the number of a class, from 0 to "
                f"{len(self.class_names) - 1}, or its name."
            )
        return value

    def _targets(self, data: Any) -> Any:
        """Labels that can be read without images: of lists, and those of torchvision's data sets; or `None`."""
        if type(data) in (list, tuple):
            return [self._parts(row)[1] for row in data]
        if isinstance(data, Subset):
            known = self._targets(data.dataset)
            return None if known is None else [known[number] for number in data.indices]
        known = getattr(data, "targets", getattr(data, "labels", None))
        whole = getattr(data, "target_transform", None) is None and hasattr(known, "__getitem__")
        return known if whole and len(known) == len(data) else None

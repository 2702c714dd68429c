"""Suites: many tasks, each with a data set, class names and templates of its own, read by `datasets`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import get_type_hints

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    Image,
    Value,
    concatenate_datasets,
    get_dataset_config_names,
    load_dataset,
)
from datasets.exceptions import DatasetsError

from ..checking import checked
from ..multitask.class_names import clean_name
from ..multitask.task import Task
from .folders import short
from .splits import Split, make_tasks, split_at_random, split_of_folders
from .validation import hold_out


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite, and how its data set is read.

    Class names are those of the data set's label column (`datasets.ClassLabel`), or `class_names`. A [`Task`] cleans
    them: capitals become small, and `_` and `-` become spaces.

    Args:
        name (`str`): in small letters and digits, such as `"sun397"`.
        template (`str` or a list of them): text of a class, with `{}` for its name; features of several are averaged.
        path (`str`, *optional*): id of the data set on the Hub, or a folder that `datasets.load_dataset` reads.
        config, revision (`str`, *optional*): as for `datasets.load_dataset`.
        image, label (`str`): the columns of images and of labels, which are whole numbers from 0 or true and false.
        train, test (`str`): the splits that train and evaluate, such as `"train"` or `"train+validation"`.
        class_names (`list[str]`, *optional*): in the order of the labels, where the data set's own are no words.
        rename (`dict[str, str]`): other names for some of the data set's classes.
        leave_out (`list[str]`): classes of the data set, by their own names, that are no classes of the task.

    Raises:
        ValueError: an invalid name, or a template or class names that a [`Task`] refuses.
    """

    name: str
    template: str | list[str]
    path: str | None = None
    config: str | None = None
    revision: str | None = None
    image: str = "image"
    label: str = "label"
    train: str = "train"
    test: str = "test"
    class_names: list[str] | None = None
    rename: dict[str, str] = field(default_factory=dict)
    leave_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z0-9]+([ -][a-z0-9]+)*", self.name):
            raise ValueError(
                f"Invalid task name {short(self.name)}: write small letters and digits, such as 'sun397'."
            )
        for each, kind in get_type_hints(type(self)).items():
            try:
                checked(getattr(self, each), kind, each)
            except ValueError as error:
                raise ValueError(f"Task {self.name!r}: {error}") from None
        Task(self.name, ["one", "two"] if self.class_names is None else self.class_names, template=self.template)

    def read(self, path: str | os.PathLike | None = None) -> Dataset:
        """Read all images that train or evaluate.

        Args:
            path: read this folder or data set instead, which has the same columns and splits, such as a local copy.

        Returns:
            A data set with the columns `image`, `label`, `file` (the split and the row's number in it) and `split`,
            `"train"` or `"test"`.

        Raises:
            ConnectionError: the Hub cannot be reached.
            ValueError: there is no `path`, it cannot be read, a column is missing, labels have gaps or are out of
                range, the classes have no names, or another number of names than of labels.
        """
        parts = {"train": self._load(self.train, path), "test": self._load(self.test, path)}
        labels = {part: self._labels(data) for part, data in parts.items()}
        feature = parts["train"].features[self.label]
        if parts["test"].features[self.label] != feature:
            raise ValueError(f"{self._where} has other labels in {self.test!r} than in {self.train!r}.")
        names = self._names(feature, np.unique(np.concatenate(list(labels.values()))))
        left = set(self._known("leave_out", self.leave_out, names))
        kept = [name for name in names if name not in left]
        place = np.array([kept.index(name) if name in kept else -1 for name in names])
        new = dict(zip(self._known("rename", list(self.rename), names), self.rename.values()))
        label = ClassLabel(names=Task(self.name, [new.get(name, name) for name in kept]).class_names)
        made = []
        for part, data in parts.items():
            numbers = place[labels[part]]
            data = data.select_columns(self.image)
            data = data if self.image == "image" else data.rename_column(self.image, "image")
            data = data.add_column("label", numbers, feature=label)
            data = data.add_column("file", [f"{part}/{row}" for row in range(len(data))], feature=Value("string"))
            data = data.add_column("split", [part] * len(data), feature=Value("string"))
            made.append(data if (numbers >= 0).all() else data.select(np.flatnonzero(numbers >= 0)))
        return concatenate_datasets(made)

    @property
    def _where(self) -> str:
        return f"The data set of task {self.name!r}"

    def _source(self, path: str | os.PathLike | None) -> str:
        """What is read. Raises a `ValueError` if there is neither a path nor a data set on the Hub."""
        source = self.path if path is None else os.path.expanduser(path)
        if source is None:
            raise ValueError(f"Task {self.name!r} has no data set on the Hub; give its folder.")
        return source

    def _load(self, split: str, path: str | os.PathLike | None) -> Dataset:
        source = self._source(path)
        try:
            if path is None:
                data = load_dataset(source, self.config, split=split, revision=self.revision)
            else:  # a copy need not have the configurations of what was copied
                config = self.config if self.config in get_dataset_config_names(source) else None
                data = load_dataset(source, config, split=split)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it needs a loading script
            kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise kind(
                f"Split {split!r} of {short(source)} for task {self.name!r} cannot be read ({reason}); connect to the "
                "Hub, log in if it asks for that, or give the folder of a copy."
            ) from error
        for column in (self.image, self.label):
            if column not in data.column_names:
                raise ValueError(
                    f"{self._where}, {short(source)}, has columns {data.column_names[:12]}, but no {column!r}; write "
                    "the names of its columns as image and label."
                )
        if not isinstance(data.features[self.image], Image):
            raise ValueError(f"Column {self.image!r} of {short(source)} for task {self.name!r} holds no images.")
        return data

    def _labels(self, data: Dataset) -> np.ndarray:
        """Labels as whole numbers, or a `ValueError` if some are missing or are no numbers."""
        values = data.with_format(None)[self.label][:]
        gaps = [row for row, value in enumerate(values) if value is None or value == -1]
        if gaps:
            raise ValueError(
                f"{self._where} has no label in row {gaps[0]} and {len(gaps) - 1} more of {len(values)} rows, as in "
                "splits without labels; write another split as test or train."
            )
        wrong = next((value for value in values if not isinstance(value, int)), None)
        if wrong is not None:
            raise ValueError(
                f"{self._where} has the label {short(wrong)}; labels are whole numbers, or true and false. Number "
                "them by `class_encode_column` of `datasets`."
            )
        return np.array(values, dtype=np.int64)

    def _names(self, feature: object, found: np.ndarray) -> list[str]:
        """The names of all classes, before any is left out, or a `ValueError` if labels and names do not fit."""
        own = feature.names if isinstance(feature, ClassLabel) else None
        names = own if self.class_names is None else self.class_names
        if names is None:
            raise ValueError(f"{self._where} has no names for its classes; write class_names.")
        if own is not None and len(own) != len(names):
            raise ValueError(f"{self._where} has {len(own)} classes, but class_names has {len(names)} names.")
        if len(found) and not 0 <= found.min() <= found.max() < len(names):
            wrong = found.max() if found.max() >= len(names) else found.min()
            raise ValueError(
                f"{self._where} has the label {wrong}, but {len(names)} class names, 0 to {len(names) - 1}."
            )
        if own is None and len(found) < len(names):
            raise ValueError(f"{self._where} has {len(found)} different labels, but {len(names)} class names.")
        return [clean_name(name) for name in names]

    def _known(self, what: str, given: Sequence[str], names: Sequence[str]) -> list[str]:
        cleaned = [clean_name(name) for name in given]
        unknown = [name for name in cleaned if name not in names]
        if unknown:
            raise ValueError(f"{what} of task {self.name!r} has {short(unknown[0])}, which is none of its classes.")
        return cleaned


@dataclass(frozen=True)
class Suite:
    """Tasks that are trained and reported together.

    Args:
        name (`str`): such as `"eight_tasks"`.
        tasks (`list[SuiteTask]`): in the order of tables.

    Raises:
        ValueError: there is no task, or two have the same name.
    """

    name: str
    tasks: list[SuiteTask]

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"Suite {self.name!r} has tasks {names}; write one or more, each with a name of its own.")

    @property
    def digest(self) -> str:
        """SHA-256 of all that its tasks are defined by: two suites with the same digest are the same."""
        return hashlib.sha256(json.dumps([asdict(task) for task in self.tasks], sort_keys=True).encode()).hexdigest()

    def read(self, paths: Mapping[str, str | os.PathLike] | None = None) -> dict[str, Dataset]:
        """Read the data set of each task, which `datasets` downloads once and keeps.

        Args:
            paths: for some tasks, another data set or the folder of a local copy, by the task's name.

        Returns:
            As [`SuiteTask.read`], by the task's name: what `split_at_random` and `make_tasks` take.

        Raises:
            ValueError: `paths` names no task of the suite; and as for [`SuiteTask.read`].
        """
        paths = dict(paths or {})
        unknown = sorted(set(paths) - {task.name for task in self.tasks})
        if unknown:
            raise ValueError(f"paths has {short(unknown[0])}, which is no task of suite {self.name!r}.")
        for task in self.tasks:  # before any is downloaded
            task._source(paths.get(task.name))
        return {task.name: task.read(paths.get(task.name)) for task in self.tasks}

    def make_tasks(self, domains: Mapping[str, Dataset], split: Split) -> list[Task]:
        """As the function [`make_tasks`], with the templates of the suite."""
        tasks: list[Task] = []
        for task in self.tasks:
            part = Split({task.name: split.train[task.name]}, {task.name: split.eval[task.name]}, split.source)
            tasks += make_tasks({task.name: domains[task.name]}, part, task.template, task.path)
        return tasks

    def load(
        self,
        fraction: float | None = None,
        shots: int | None = None,
        seed: int = 0,
        validation: float | None = None,
        paths: Mapping[str, str | os.PathLike] | None = None,
    ) -> list[Task]:
        """Read the suite and make its tasks.

        Args:
            fraction, shots: how many training images of each class train; all of them if neither is given.
            seed: decides which.
            validation: evaluate on this share of them, which then does not train, instead of on the test images.
            paths: as for `read`.

        Raises:
            ValueError: as for `read`, `split_at_random` and `hold_out`.
        """
        domains = self.read(paths)
        if fraction is None and shots is None:
            split = split_of_folders(domains)
        else:
            split = split_at_random(domains, fraction, shots, seed)
        if validation is not None:
            domains, split = hold_out(domains, split, validation, seed)
        return self.make_tasks(domains, split)

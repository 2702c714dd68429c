"""Splits of images into those for training and those for evaluation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..multitask.files import write_json
from ..multitask.task import DEFAULT_TEMPLATE, Task


@dataclass
class Split:
    """The images of each domain for training and for evaluation, by their names in the column `file`.

    Args:
        train, eval (`dict[str, list[str]]`): files by domain.
        source (`dict`): how the split was made.
    """

    train: dict[str, list[str]]
    eval: dict[str, list[str]]
    source: dict

    @property
    def digest(self) -> str:
        """SHA-256 of the chosen files: two splits with the same digest are the same."""
        return hashlib.sha256(json.dumps([self.train, self.eval], sort_keys=True).encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write the split to a JSON file."""
        write_json({"source": self.source, "digest": self.digest, "train": self.train, "eval": self.eval}, path)


def _choose(
    files: Sequence[str], labels: np.ndarray, fraction: float | None, shots: int | None, seed: Sequence[int]
) -> list[list[str]]:
    """Random files of each class (a fraction of them, or `shots`), and the other files, in the order of `files`."""
    if (fraction is None) == (shots is None):
        raise ValueError(f"Give either fraction or shots, not fraction={fraction} and shots={shots}.")
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} leaves nothing to train or to evaluate on; write a number in (0, 1).")
    if shots is not None and shots < 1:
        raise ValueError(f"shots={shots} leaves nothing to train on; write 1 or more.")
    rng, chosen = np.random.default_rng(seed), np.zeros(len(files), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[rng.permutation(rows)[: shots or max(1, round(fraction * len(rows)))]] = True
    return [[files[row] for row in np.flatnonzero(part)] for part in (chosen, ~chosen)]


def split_at_random(
    domains: Mapping[str, Dataset],
    fraction: float | None = None,
    shots: int | None = None,
    seed: int = 0,
    at_most: int | None = None,
) -> Split:
    """Choose random images of each class of each domain for training, and all others for evaluation.

    Args:
        domains: data sets with the columns `label` and `file`.
        fraction: share of each class's images for training, between 0 and 1; at least one image.
        shots: number of images of each class for training, instead of `fraction`.
        seed: seed of the choice.
        at_most (`int`, *optional*): use only a subset, the same for every seed: of each class of each domain the
            `at_most` images whose `file` has the smallest SHA-256.

    Raises:
        ValueError: neither or both of `fraction` and `shots`, or a number out of range.
    """
    source = {"fraction": fraction, "shots": shots, "seed": seed}
    if at_most is not None:
        if at_most < 2:
            raise ValueError(f"at_most={at_most} leaves nothing to train or to evaluate on; write 2 or more.")
        source["subset"] = f"of each class of each domain the {at_most} images whose file has the smallest SHA-256"
    train, held_out = {}, {}
    for number, (name, data) in enumerate(domains.items()):
        files, labels = data.with_format(None)["file"][:], np.asarray(data.with_format("numpy")["label"])
        if at_most is not None:
            by_hash = np.array(sorted(range(len(files)), key=lambda row: hashlib.sha256(files[row].encode()).digest()))
            rows = sorted(row for label in np.unique(labels) for row in by_hash[labels[by_hash] == label][:at_most])
            files, labels = [files[row] for row in rows], labels[rows]
        train[name], held_out[name] = _choose(files, labels, fraction, shots, [seed, number])
    return Split(train, held_out, source)


def draw(split: Split, fraction: float | None = None, shots: int | None = None, seed: int = 0) -> Split:
    """Choose some of a split's training images of each class, and evaluate on the same images as the split.

    The split's files have the form `domain/class/image`. Other arguments and errors are as for `split_at_random`.
    """
    train = {}
    for number, (name, files) in enumerate(split.train.items()):
        classes = np.array([file.split("/")[-2] for file in files])
        train[name], _ = _choose(files, classes, fraction, shots, [seed, number])
    return Split(train, split.eval, {**split.source, "fraction": fraction, "shots": shots, "seed": seed})


def read_lists(folder: str | os.PathLike, fraction: float) -> Split:
    """Read the published lists of a fraction: for 0.1, `folder/Art/train_10.txt` and `test_10.txt`, and so on.

    Raises:
        ValueError: there are no such lists, or they do not fit together (`split_of_lists`).
    """
    percent = f"{100 * fraction:g}"
    lists = (sorted(Path(folder).glob(f"*/{part}_{percent}.txt")) for part in ("train", "test"))
    train, test = ({path.parent.name: path for path in paths} for paths in lists)
    if not train or list(train) != list(test):
        raise ValueError(
            f"{folder} has no lists of {percent} % for each domain; look for files such as "
            f"{folder}/Art/train_{percent}.txt and test_{percent}.txt."
        )
    return split_of_lists(train, test, {"lists": f"{percent} %"})


def split_of_lists(train: Mapping[str, Path], test: Mapping[str, Path], source: dict) -> Split:
    """Read the lists of each domain, with lines `Art/Alarm_Clock/00001.jpg 0`.

    The classes are read from the paths. The numbers at the ends of lines only have to be the same in all lists.

    Args:
        train, test: path of the list, by domain.
        source: as for `Split`.

    Raises:
        ValueError: a line is not of this form, lines number the classes differently, or an image of a training list
            is in the test list as well.
    """
    label_of, class_of = {}, {}

    def read(path: Path) -> list[str]:
        files = []
        for line in filter(str.strip, path.read_text().splitlines()):
            file, _, label = line.strip().rpartition(" ")
            if not label.isdigit() or file.count("/") != 2:
                raise ValueError(f"Line {line!r} of {path} is not of the form Domain/Class/file label.")
            name = file.split("/")[1]
            if label_of.setdefault(name, label) != label or class_of.setdefault(label, name) != name:
                raise ValueError(
                    f"Line {line!r} of {path} gives {name!r} the label {label}, but elsewhere its label is "
                    f"{label_of[name]}, and {label} is the label of {class_of.get(label)!r}; give lists that number "
                    "their classes alike."
                )
            files.append(file)
        return files

    train_files, test_files = ({domain: read(path) for domain, path in paths.items()} for paths in (train, test))
    for domain, files in train_files.items():
        both = set(files).intersection(test_files[domain])
        if both:
            raise ValueError(
                f"{min(both)!r} and {len(both) - 1} more images are in {train[domain]} and in {test[domain]} as well; "
                "give lists whose test images do not train."
            )
    return Split(train_files, test_files, source)


def make_tasks(
    domains: Mapping[str, Dataset],
    split: Split,
    template: str | Sequence[str] = DEFAULT_TEMPLATE,
    dataset: str | None = None,
) -> list[Task]:
    """Make a task of each domain of the split.

    Args:
        domains: data sets with the columns `image`, `label` and `file`.
        split: which files train and evaluate.
        template, dataset: as for `Task`.

    Raises:
        ValueError: the data lack a domain or a file of the split.
    """
    # Office-Home's folder says "Real World", its lists say "Real_World".
    by_name = {_plain(name): data for name, data in domains.items()}
    tasks = []
    for name in split.train:
        if _plain(name) not in by_name:
            raise ValueError(f"The split has a domain {name!r}, but the data have {sorted(domains)}.")
        data = by_name[_plain(name)]
        row_of = {_plain(file): row for row, file in enumerate(data.with_format(None)["file"])}
        parts = {"train": split.train[name], "eval": split.eval[name]}
        missing = [file for files in parts.values() for file in files if _plain(file) not in row_of]
        if missing:
            raise ValueError(
                f"The split names {missing[0]!r} and {len(missing) - 1} more files of {name!r} that the data lack; "
                "give the folder that the lists were made for."
            )
        images = {part: data.select([row_of[_plain(file)] for file in files]) for part, files in parts.items()}
        class_names = data.features["label"].names
        tasks.append(Task(name.replace("_", " ").lower(), class_names, **images, template=template, dataset=dataset))
    return tasks


def _plain(name: str) -> str:
    return name.replace(" ", "_").lower()

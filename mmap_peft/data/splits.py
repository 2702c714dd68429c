"""Splits of images into those for training and those for evaluation."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Lt
from datasets import Dataset

from ..checking import checked
from ..multitask.files import write_json
from ..multitask.task import DEFAULT_TEMPLATE, Task
from .folders import is_hidden, short, spelling
from .lists import ListReader, path_text
from .places import Places


logger = logging.getLogger(__name__)


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
    files: Sequence[str],
    labels: np.ndarray,
    fraction: float | None,
    shots: int | None,
    seed: Sequence[int],
    others_evaluate: bool = True,
) -> list[list[str]]:
    """Random files of each class (a fraction of them, or `shots`), and the other files, in the order of `files`."""
    if (fraction is None) == (shots is None):
        raise ValueError(f"Give either fraction or shots, not fraction={fraction} and shots={shots}.")
    checked(seed[0], Annotated[int, Ge(0)], "seed")
    whole = fraction == 1 and not others_evaluate
    if fraction is not None and not 0 < checked(fraction, float, "fraction") < 1 and not whole:
        raise ValueError(f"fraction={fraction} leaves nothing to train or to evaluate on; write a number in (0, 1).")
    if shots is not None and checked(shots, int, "shots") < 1:
        raise ValueError(f"shots={shots} leaves nothing to train on; write 1 or more.")
    rng, chosen = np.random.default_rng(seed), np.zeros(len(files), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        amount = shots if fraction is None else max(1, round(fraction * len(rows)))
        chosen[rng.permutation(rows)[:amount]] = True
    return [[files[row] for row in np.flatnonzero(part).tolist()] for part in (chosen, ~chosen)]


def split_of_folders(domains: Mapping[str, Dataset]) -> Split:
    """Train and evaluate on the images whose folders say so: the column `split` of `read_folder`.

    Images of `"train"` train, those of `"test"` evaluate, or those of `"validation"` in a domain without any of
    `"test"`. Where there are both, those of `"validation"` are left out, with a warning.

    Raises:
        ValueError: there is no such column, or two images of a domain have the same `file`.
    """
    train, held_out = {}, {}
    for name, data in domains.items():
        rows = _given_rows(data)
        if rows is None:
            raise ValueError(f"The folders of {short(name)} do not say which images train; write split_at_random.")
        files = _files(name, data)
        train[name], held_out[name] = ([files[row] for row in part] for part in rows)
        left = len(files) - len(train[name]) - len(held_out[name])
        if left:
            logger.warning("%d validation images of %s are left out, since there are test images.", left, short(name))
    return Split(train, held_out, {"folders": "train, test or validation"})


def has_split(domains: Mapping[str, Dataset]) -> bool:
    """Whether the folders say which images train and which evaluate, so that `split_of_folders` can be used."""
    rows = [given for data in domains.values() if (given := _given_rows(data)) is not None]
    return len(rows) == len(domains) and all(any(len(parts[number]) for parts in rows) for number in (0, 1))


def _given_rows(data: Dataset) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows for training and for evaluation by the column `split`, or `None` if there is no such column."""
    if "split" not in data.column_names:
        return None
    splits = np.array(data.with_format(None)["split"][:], dtype=object)
    evaluates = "test" if "test" in splits else "validation"
    return np.flatnonzero(splits == "train"), np.flatnonzero(splits == evaluates)


def _files(name: str, data: Dataset) -> list[str]:
    """The column `file`, or a `ValueError` if two images are called the same."""
    files = data.with_format(None)["file"][:]
    if len(set(files)) < len(files):
        twice = next(file for file, count in Counter(files).items() if count > 1)
        raise ValueError(f"Two images of {short(name)} have the `file` {short(twice)}; give each a `file` of its own.")
    return files


def split_at_random(
    domains: Mapping[str, Dataset],
    fraction: float | None = None,
    shots: int | None = None,
    seed: int = 0,
    at_most: int | None = None,
) -> Split:
    """Choose random images of each class of each domain for training, and all others for evaluation.

    If the folders say which images train and which evaluate (`has_split`), it is chosen from the first, and the second
    evaluate, as by `split_of_folders`.

    Args:
        domains: data sets with the columns `label` and `file`.
        fraction: share of each class's images for training, between 0 and 1; at least one image. It can be 1 if the
            folders say which images evaluate.
        shots: number of images of each class for training, instead of `fraction`.
        seed: seed of the choice.
        at_most (`int`, *optional*): use only a subset, the same for every seed: of each class of each domain the
            `at_most` images whose `file` has the smallest SHA-256.

    Raises:
        ValueError: neither or both of `fraction` and `shots`, a number out of range, or two images of a domain with
            the same `file`.
    """
    source: dict[str, Any] = {"fraction": fraction, "shots": shots, "seed": seed}
    if at_most is not None:
        if checked(at_most, int, "at_most") < 2:
            raise ValueError(f"at_most={at_most} leaves nothing to train or to evaluate on; write 2 or more.")
        source["subset"] = f"of each class of each domain the {at_most} images whose file has the smallest SHA-256"
    train, held_out, given = {}, {}, has_split(domains)
    for number, (name, data) in enumerate(domains.items()):
        files, labels = _files(name, data), np.asarray(data.with_format("numpy")["label"])
        rows, evaluated = (_given_rows(data) if given else None) or (np.arange(len(files)), np.arange(0))
        if at_most is not None:
            rows, evaluated = (_subset(files, labels, part, at_most) for part in (rows, evaluated))
        chosen = [files[row] for row in rows]
        train[name], others = _choose(chosen, labels[rows], fraction, shots, [seed, number], not given)
        held_out[name] = [files[row] for row in evaluated] if given else others
    return Split(train, held_out, source)


def _subset(files: Sequence[str], labels: np.ndarray, rows: np.ndarray, at_most: int) -> np.ndarray:
    """Of each class the `at_most` rows whose file has the smallest SHA-256."""
    by_hash = np.array(sorted(rows, key=lambda row: hashlib.sha256(files[row].encode()).digest()), dtype=np.int64)
    return np.sort(
        np.concatenate([by_hash[:0], *(by_hash[labels[by_hash] == label][:at_most] for label in np.unique(labels))])
    )


def draw(split: Split, fraction: float | None = None, shots: int | None = None, seed: int = 0) -> Split:
    """Choose some of a split's training images of each class, and evaluate on the same images as the split.

    The last folder in a file's name is the class, as in `domain/class/image`. Other arguments and errors are as for
    `split_at_random`.
    """
    train = {}
    for number, (name, files) in enumerate(split.train.items()):
        names = [PurePosixPath(file).parent.name for file in files]
        if not all(names):
            raise ValueError(
                f"The class of {short(files[names.index('')])} is not known; give a split of files domain/class/image."
            )
        first: dict[str, str] = {}  # a class can be written in several ways
        classes = np.array([first.setdefault(spelling(name), name) for name in names])
        train[name], _ = _choose(files, classes, fraction, shots, [seed, number])
    return Split(train, split.eval, {**split.source, "fraction": fraction, "shots": shots, "seed": seed})


def read_lists(folder: str | os.PathLike, fraction: float) -> Split:
    """Read the published lists of a fraction: for 0.1, `folder/Art/train_10.txt` and `test_10.txt`, and so on.

    Raises:
        ValueError: there are no such lists, or they do not fit together (`split_of_lists`).
    """
    percent = f"{100 * checked(fraction, Annotated[float, Gt(0), Lt(1)], 'fraction'):g}"
    lists = (sorted(Path(folder).expanduser().glob(f"*/{part}_{percent}.txt")) for part in ("train", "test"))
    train, test = ({path.parent.name: path for path in paths if not is_hidden(path.parent.name)} for paths in lists)
    if not train or list(train) != list(test):
        raise ValueError(
            f"{path_text(folder)} has no lists of {percent} % for each domain; look for files such as "
            f"Art/train_{percent}.txt and Art/test_{percent}.txt in it."
        )
    return split_of_lists(train, test, {"lists": f"{percent} %"})


def split_of_lists(train: Mapping[str, Path], test: Mapping[str, Path], source: dict) -> Split:
    """Read the lists of each domain, with lines `Art/Alarm_Clock/00001.jpg 0`.

    The classes are read from the paths. The numbers at the ends of lines only have to be the same in all lists.

    Args:
        train, test: path of the list, by domain.
        source: as for `Split`.

    Raises:
        ValueError: as for `ListReader.read`, or an image of a training list is in the test list as well.
    """
    read = ListReader().read
    train_files, test_files = ({domain: read(path) for domain, path in paths.items()} for paths in (train, test))
    for domain, files in train_files.items():
        both = set(files).intersection(test_files.get(domain, ()))
        if both:
            raise ValueError(
                f"{short(min(both))} and {len(both) - 1} more images are in {path_text(train[domain])} and in "
                f"{path_text(test[domain])} as well; give lists whose test images do not train."
            )
    return Split(train_files, test_files, source)


def rows_of_split(domains: Mapping[str, Dataset], split: Split) -> dict[str, tuple[Dataset, dict[str, list[int]]]]:
    """For each domain of a split its data, and the rows of its files for `"train"` and for `"eval"`.

    Domains and files of the split that the data lack may differ in case, and in `_` for a space, from one of the data.

    Raises:
        ValueError: the data lack a domain or a file of the split, or it may be one of several; or the split names an
            image twice, such as for training and for evaluation.
    """
    if set(split.train) != set(split.eval):
        one = min(set(split.train) ^ set(split.eval))
        raise ValueError(
            f"The split has {short(one)} only in train or only in eval; give it an empty list in the other."
        )
    places, name_of = Places(list(domains)), dict[int, str]()
    found: dict[str, tuple[Dataset, dict[str, list[int]]]] = {}
    for name in split.train:
        place = places.find(name)
        if place is None:
            raise ValueError(
                f"The split has a domain {short(name)}, but the data have {short(', '.join(map(str, domains)))}."
            )
        if name_of.setdefault(place, name) != name:
            raise ValueError(
                f"{short(name)} and {short(name_of[place])} of the split are the same domain of the data."
            )
        data, parts = domains[places.names[place]], {"train": split.train[name], "eval": split.eval[name]}
        found[name] = data, Places(data.with_format(None)["file"][:]).rows(parts, name)
    return found


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
        ValueError: as for `rows_of_split`.
    """
    tasks = []
    for name, (data, rows) in rows_of_split(domains, split).items():
        images = {part: data.select(chosen) for part, chosen in rows.items()}
        class_names = data.features["label"].names
        tasks.append(Task(name.replace("_", " ").lower(), class_names, **images, template=template, dataset=dataset))
    return tasks

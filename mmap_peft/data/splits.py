"""Which images train and which evaluate."""

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
    """The images of each domain, by the `file` column, that train and that evaluate.

    Args:
        train, eval (`dict[str, list[str]]`): files by domain.
        source (`dict`): how the split came about.
    """

    train: dict[str, list[str]]
    eval: dict[str, list[str]]
    source: dict

    @property
    def digest(self) -> str:
        """SHA-256 of the chosen files: two splits with the same digest are the same."""
        chosen = json.dumps([self.train, self.eval], sort_keys=True)
        return hashlib.sha256(chosen.encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write the split to a JSON file."""
        write_json({"source": self.source, "digest": self.digest, "train": self.train, "eval": self.eval}, path)


def _choose(labels: np.ndarray, count_of: Mapping[int, int], rng: np.random.Generator) -> np.ndarray:
    """Rows of `count_of[label]` random images of each class, in ascending order."""
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:count] for label, count in sorted(count_of.items())]
    return np.sort(np.concatenate(chosen))


def split_at_random(
    domains: Mapping[str, Dataset], fraction: float | None = None, shots: int | None = None, seed: int = 0
) -> Split:
    """Take some images of each class of each domain to train on, and evaluate on all the others.

    Args:
        domains: data sets with the columns `label` and `file`.
        fraction: share of each class's images that train, between 0 and 1; at least one image.
        shots: instead, so many images of each class.
        seed: seed of the choice.

    Raises:
        ValueError: neither or both of `fraction` and `shots`, or one out of range.
    """
    if (fraction is None) == (shots is None):
        raise ValueError(f"Give either fraction or shots, not fraction={fraction} and shots={shots}.")
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} leaves nothing to train or to evaluate on; write a number in (0, 1).")
    if shots is not None and shots < 1:
        raise ValueError(f"shots={shots} leaves nothing to train on; write 1 or more.")
    train, held_out = {}, {}
    for number, (name, data) in enumerate(domains.items()):
        labels, files = np.asarray(data.with_format("numpy")["label"]), data.with_format(None)["file"]
        values, counts = np.unique(labels, return_counts=True)
        wanted = {
            int(value): shots if shots is not None else max(1, round(fraction * count))
            for value, count in zip(values, counts)
        }
        chosen = set(_choose(labels, wanted, np.random.default_rng([seed, number])).tolist())
        train[name] = [file for row, file in enumerate(files) if row in chosen]
        held_out[name] = [file for row, file in enumerate(files) if row not in chosen]
    return Split(train, held_out, {"fraction": fraction, "shots": shots, "seed": seed})


def read_lists(folder: str | os.PathLike, fraction: float) -> Split:
    """Published lists: `folder/Art/train_10.txt` and `test_10.txt` with lines `Art/Alarm_Clock/00001.jpg 0`.

    Args:
        folder: the folder of the lists.
        fraction: 0.1 stands for the lists of 10 %.

    Raises:
        ValueError: there are no such lists, or a line is not of this form.
    """
    percent = f"{100 * fraction:g}"
    lists = {split: sorted(Path(folder).glob(f"*/{split}_{percent}.txt")) for split in ("train", "test")}
    if not lists["train"] or [path.parent for path in lists["train"]] != [path.parent for path in lists["test"]]:
        raise ValueError(
            f"{folder} has no lists of {percent} % for each domain; look for files such as "
            f"{folder}/Art/train_{percent}.txt and test_{percent}.txt."
        )
    chosen = {
        split: {
            path.parent.name: [_file(line, path) for line in path.read_text().splitlines() if line.strip()]
            for path in paths
        }
        for split, paths in lists.items()
    }
    return Split(chosen["train"], chosen["test"], {"lists": f"{percent} %"})


def _file(line: str, path: Path) -> str:
    file, _, label = line.strip().rpartition(" ")
    if not label.isdigit() or file.count("/") != 2:
        raise ValueError(f"Line {line!r} of {path} is not of the form Domain/Class/file label.")
    return file


def make_tasks(
    domains: Mapping[str, Dataset],
    split: Split,
    template: str | Sequence[str] = DEFAULT_TEMPLATE,
    dataset: str | None = None,
) -> list[Task]:
    """One task a domain of the split.

    Args:
        domains: data sets with the columns `image`, `label` and `file`.
        split: which files train and evaluate.
        template: text of a class.
        dataset: id on the Hub, or name, of the data set, for the model card.

    Raises:
        ValueError: the data lack a domain or a file of the split.
    """
    # Office-Home's folder says "Real World", its lists say "Real_World".
    known = {_plain(name): data for name, data in domains.items()}
    tasks = []
    for name in split.train:
        if _plain(name) not in known:
            raise ValueError(f"The split has a domain {name!r}, but the data have {sorted(domains)}.")
        data = known[_plain(name)]
        place = {_plain(file): row for row, file in enumerate(data.with_format(None)["file"])}
        parts = {}
        for part, files in (("train", split.train[name]), ("eval", split.eval[name])):
            missing = [file for file in files if _plain(file) not in place]
            if missing:
                raise ValueError(
                    f"The split names {missing[0]!r} and {len(missing) - 1} more files of {name!r} that the data "
                    "lack; give the folder that the lists were made for."
                )
            parts[part] = data.select([place[_plain(file)] for file in files])
        names = data.features["label"].names
        tasks.append(Task(name.replace("_", " ").lower(), names, **parts, template=template, dataset=dataset))
    return tasks


def _plain(name: str) -> str:
    return name.replace(" ", "_").lower()

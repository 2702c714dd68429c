"""Near-duplicates: training images that are in the test images as well, in another size or compression."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from .folders import short
from .lists import path_text, read_names
from .picture_hashes import hash_pictures, nearest
from .places import Places
from .splits import Split, rows_of_split


logger = logging.getLogger(__name__)


def find_duplicates(domains: Mapping[str, Dataset], split: Split) -> dict[str, dict[str, str]]:
    """The training images that are near-duplicates of an evaluation image of any domain, by `picture_hash`.

    Images that cannot be read are left out.

    Args:
        domains: data sets with the columns `image` and `file`.
        split: which files train and evaluate.

    Returns:
        For each domain of the split, the evaluation image's `file` by the training image's.

    Raises:
        ValueError: the data lack a domain or a file of the split.
    """
    rows = rows_of_split(domains, split)
    hashed = {}
    for part in ("train", "eval"):
        for name, (data, rows_by_part) in rows.items():
            description = f"Duplicates: {part} images of {short(name)}"
            hashed[part, name] = hash_pictures(data, rows_by_part[part], description)
    files = []
    for name, (data, _) in rows.items():
        names = _files(data)
        files += [names[row] for row in hashed["eval", name][0]]
    others = np.concatenate([hashed["eval", name][1] for name in rows])
    found = {}
    for name, (_, rows_by_part) in rows.items():
        file_of = dict(zip(rows_by_part["train"], split.train[name]))
        chosen, hashes = hashed["train", name]
        found[name] = {file_of[row]: files[place] for row, place in zip(chosen, nearest(hashes, others)) if place >= 0}
    return found


def drop_duplicates(domains: Mapping[str, Dataset], split: Split, listed: str | os.PathLike | None = None) -> Split:
    """A split without the training images that are near-duplicates of an evaluation image (`find_duplicates`).

    Evaluation images stay, so that results are on the same images as without.

    Args:
        domains, split: as for `find_duplicates`.
        listed (*optional*): a text file of more images that are not to train, with a line for each such as
            `clipart/aircraft_carrier/clipart_001_000001.jpg`, as DomainBed's list of DomainNet's duplicates. A number
            after the name, as in lists of training images, is ignored.

    Returns:
        The split; its `source` says how many training images were dropped (`duplicates`).

    Raises:
        OSError: the list cannot be read.
        ValueError: as for `find_duplicates`, the list is no such text file, or it names no image of the data.
    """
    found, names = find_duplicates(domains, split), Places([])
    if listed is not None:
        names = Places(read_names(Path(listed).expanduser()))
        if not any(names.find(file) is not None for data in domains.values() for file in _files(data)):
            raise ValueError(
                f"{path_text(listed)} names no image of the data; write paths such as "
                f"{short(_files(next(iter(domains.values())))[0])}."
            )
    train = {
        name: [file for file in files if file not in found[name] and names.find(file) is None]
        for name, files in split.train.items()
    }
    dropped = sum(len(files) - len(train[name]) for name, files in split.train.items())
    if dropped:
        logger.warning("%d training images are duplicates of evaluation images and do not train.", dropped)
    return replace(split, train=train, source={**split.source, "duplicates": dropped})


def _files(data: Dataset) -> list[str]:
    return data.with_format(None)["file"][:]

"""What commands read: a trained model, a CLIP, and images from a folder or from the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from transformers import CLIPModel

from ..data.domains import read_folder, read_hub
from ..data.folders import short
from ..data.splits import Split
from ..data.suites import SuiteTask
from ..hub.repository import hub_id
from ..multitask.classifier import MultiTaskClassifier
from ..multitask.files import read_json
from ..multitask.loading import load_processor
from ..multitask.rows import IMAGE_COLUMNS, LABEL_COLUMNS, SPLITS, column


MODEL_HELP = "folder of a trained model, or its name on the Hub"
DATA_HELP = "folder of images, domain/class/image or class/image, or a data set's name on the Hub"
SPLIT_FILE = "split.json"


def read_model(name: str) -> MultiTaskClassifier:
    """A trained model from a folder or from the Hub.

    Raises:
        ValueError, OSError: as for `MultiTaskClassifier.from_pretrained`, or there is no such folder.
    """
    _check_name(name, "model")
    return MultiTaskClassifier.from_pretrained(name)


def read_clip(name: str) -> tuple[CLIPModel, Any]:
    """A CLIP and its processor, from a folder or from the Hub."""
    _check_name(name, "CLIP")
    with _of_the_hub(name, "CLIP"):
        return CLIPModel.from_pretrained(name), load_processor(name)


def read_data(name: str) -> dict[str, Dataset]:
    """Images by domain, as `read_folder` returns them.

    A set on the Hub without a column `domain` is one domain. Its splits are those of the Hub, if it has one to train
    and one to test or to validate on.
    """
    _check_name(name, "folder of images")
    if os.path.isdir(os.path.expanduser(name)):
        return read_folder(name)
    with _of_the_hub(name, "data set"):
        splits = load_dataset(name)
        columns = next(iter(splits.values())).column_names
        return read_hub(name) if "domain" in columns else {_plain(name): _one_domain(name, list(splits), columns)}


def _one_domain(name: str, splits: list[str], columns: list[str]) -> Dataset:
    where = f"images of {name}"
    image, label = column(columns, IMAGE_COLUMNS, where), column(columns, LABEL_COLUMNS, where)
    train = next((each for each in SPLITS["train"] if each in splits), splits[0])
    test = next((each for each in ("test", *SPLITS["eval"]) if each in splits and each != train), train)
    data = SuiteTask(_plain(name), "{}", name, image=image, label=label, train=train, test=test).read()
    if test != train:
        return data
    first = np.flatnonzero(np.array(data.with_format(None)["split"][:], dtype=object) == "train")
    return data.select(first).remove_columns("split")


def _plain(name: str) -> str:
    """A repository's name without its owner, in small letters and digits."""
    return re.sub(r"[^a-z0-9]+", " ", name.split("/")[-1].lower()).strip() or "data"


def read_split(model: str) -> Split | None:
    """The images that a model was trained and evaluated on, if its folder says so."""
    path = Path(model) / SPLIT_FILE
    if not path.is_file():
        return None
    fields = read_json(path)
    try:
        return Split(dict(fields["train"]), dict(fields["eval"]), dict(fields["source"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say which images train and which evaluate; remove it.") from error


def _check_name(name: str, what: str) -> None:
    if not os.path.isdir(os.path.expanduser(name)) and (os.path.exists(name) or hub_id(name) is None):
        raise ValueError(f"{short(name)} is no {what}: neither a folder that exists nor a name on the Hub.")


@contextmanager
def _of_the_hub(name: str, what: str) -> Iterator[None]:
    """Inside the `with` block, errors of reading what is no folder say that it was looked for on the Hub."""
    try:
        yield
    except (OSError, DatasetsError) as error:
        if os.path.isdir(os.path.expanduser(name)):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
        raise OSError(
            f"{short(name)} is no folder here, and the Hub gives no {what} of this name ({reason}); connect to the "
            "internet, correct the name, or write the path of a folder."
        ) from error

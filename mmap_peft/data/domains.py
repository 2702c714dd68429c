"""Data sets of several domains with the same classes: one `datasets.Dataset` a domain, by its name."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import MinLen
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset

from ..checking import checked
from ..hub.repository import hub_id
from ..keywords import check_keywords
from .chosen import ChosenFolders, match, warn_of_merged
from .folders import LAYOUTS, SPLIT_OF, ImageTree


logger = logging.getLogger(__name__)


def read_folder(
    path: str | os.PathLike,
    domains: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    layout: str | None = None,
) -> dict[str, Dataset]:
    """Read domains from a folder of images, such as `path/Art/Alarm_Clock/00001.jpg`.

    The layouts of `LAYOUTS` are told apart by how deep the images lie, which has to be the same for all, and by
    folders called train, training, val, valid, validation, dev, test, testing, eval or evaluation. Without a level of
    domains there is one, named after `path`. Hidden files and folders are left out.

    Args:
        path: the folder.
        domains, classes (`Sequence[str]`, *optional*): only these, in this order. They match names on disk that differ
            in case, `_`, `-` and spaces. Folders that match each other become one domain or class, with a warning.
        layout (`str`, *optional*): one of `LAYOUTS`, for folders whose names fit several.

    Returns:
        For each domain a data set with the columns `image` (undecoded), `label` and `file` (the path inside the
        folder), and, if the layout has splits, `split`: `"train"`, `"validation"` or `"test"`. All domains have the
        same classes: those asked for, or those of all of them in alphabetical order.

    Raises:
        OSError: the folder, or one in it that is read, is missing or may not be read.
        ValueError: the folder has no such images or no clear layout, or lacks a domain or class that is asked for; a
            name is not valid Unicode; or links lead twice to one image of a domain.
    """
    _check_names(domains, classes)
    tree = ImageTree.scan(Path(path).expanduser())
    checked(layout, Literal[LAYOUTS] | None, "layout")
    levels = tree.layout(domains, classes) if layout is None else layout.split("/")
    chosen = ChosenFolders(tree, levels, {"domain": domains, "class": classes})
    chosen.check()
    return _data_sets(chosen, domains, classes)


def _data_sets(
    chosen: ChosenFolders, domains: Sequence[str] | None, classes: Sequence[str] | None
) -> dict[str, Dataset]:
    class_of, domain_of = chosen.matches["class"], chosen.matches["domain"]
    number = {name: place for place, name in enumerate(classes or sorted({*class_of.values()}))}
    features = {"image": Image(decode=False), "label": ClassLabel(names=list(number)), "file": Value("string")}
    features |= {"split": Value("string")} if "split" in chosen.levels else {}
    found = domains or sorted({*domain_of.values()})
    columns: dict[str, dict[str, list]] = {domain: {name: [] for name in features} for domain in found}
    for parts in chosen.folders:
        files, values = chosen.tree.images[parts], columns[domain_of[chosen.name("domain", parts)]]
        values["image"] += [os.path.join(chosen.tree.root, *parts, file) for file in files]
        values["label"] += [number[class_of[chosen.name("class", parts)]]] * len(files)
        values["file"] += ["/".join((*parts, file)) for file in files]
        if "split" in features:
            values["split"] += [SPLIT_OF[chosen.name("split", parts).lower()]] * len(files)
    return {domain: Dataset.from_dict(values, Features(features)) for domain, values in columns.items()}


def _check_names(domains: Sequence[str] | None, classes: Sequence[str] | None) -> None:
    for names, kind in ((domains, "domains"), (classes, "classes")):
        checked(names, Annotated[Sequence[str], MinLen(1)] | None, kind)


@check_keywords()
def read_hub(
    name: str,
    domains: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Dataset]:
    """Read domains from all splits of a data set on the Hub with the columns `image`, `domain` and `label`.

    Args:
        name: for example `"flwrlabs/office-home"`.
        domains, classes: as for `read_folder`.
        revision, token, cache_dir: as for `datasets.load_dataset`.

    Returns:
        As `read_folder`; `file` is the column `image_path`, or the row's number where there is no such column.

    Raises:
        ValueError: a column is missing, the labels have no names, or a domain or class that is asked for is missing.
    """
    _check_names(domains, classes)
    splits = load_dataset(name, revision=revision, token=token, cache_dir=cache_dir)
    data, source = _with_files(list(splits.values()), name), f"Data set {name!r}"
    wanted = np.ones(len(data), dtype=bool)
    if classes is not None:
        names = data.features["label"].names
        class_of = match(set(names), classes, source, "class")
        number_of = np.array([classes.index(class_of[name]) if name in class_of else -1 for name in names])
        labels = number_of[data.with_format("numpy")["label"][:]]
        # The column is added before rows are selected: if added later, all images would be written again.
        data = data.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=list(classes)))
        wanted = labels >= 0
    feature, values = data.features["domain"], data.with_format(None)["domain"][:]
    names = [feature.int2str(value) if isinstance(feature, ClassLabel) else str(value) for value in values]
    domain_of = match(set(names), domains, source, "domain")
    warn_of_merged(domain_of, source, "domain")
    rows = np.array([domain_of.get(name) for name in names], dtype=object)
    found = domains or sorted({*domain_of.values()})
    return {domain: data.select(np.flatnonzero(wanted & (rows == domain))) for domain in found}


def _with_files(splits: Sequence[Dataset], name: str) -> Dataset:
    """All rows with the column `file`, or a `ValueError` if a column that `read_hub` needs is missing or has gaps."""
    for split in splits:
        for column in ("image", "domain", "label"):
            if column not in split.column_names:
                raise ValueError(
                    f"Data set {name!r} has columns {split.column_names[:12]}, but no {column!r}; it needs image, "
                    "domain, label."
                )
        if split.features != splits[0].features:
            raise ValueError(
                f"The splits of data set {name!r} have different columns; give one whose splits are alike."
            )
    data = concatenate_datasets(splits)
    if not isinstance(data.features["label"], ClassLabel):
        raise ValueError(
            f"The labels of data set {name!r} are not a ClassLabel, so its classes have no names; give one with names."
        )
    plain = data.with_format(None)
    for column in ("domain", "label"):
        values = plain[column][:]
        gaps = [row for row, value in enumerate(values) if value is None or value == -1]
        if gaps:
            raise ValueError(
                f"Row {gaps[0]} and {len(gaps) - 1} more of {len(values)} rows of data set {name!r} have no {column} "
                f"({values[gaps[0]]}), as in test splits without labels; load it by `datasets.load_dataset`, and make "
                "a Task of the rows that have one."
            )
    data = data.remove_columns({"file"}.intersection(data.column_names))
    if "image_path" in data.column_names:
        files = plain["image_path"][:]
        if len(set(files)) == len(files) and all(isinstance(file, str) for file in files):
            return data.rename_column("image_path", "file")
        logger.warning("Rows of data set %r have the same or no image_path, so `file` is the row's number.", name)
    return data.add_column("file", list(map(str, range(len(data)))))


def read_domains(
    data: str, domains: Sequence[str] | None = None, classes: Sequence[str] | None = None
) -> dict[str, Dataset]:
    """Read domains by `read_folder` if `data` is a path, or else, if it can be a name on the Hub, by `read_hub`."""
    is_path = os.path.exists(os.path.expanduser(data)) or hub_id(data) is None
    return (read_folder if is_path else read_hub)(data, domains, classes)

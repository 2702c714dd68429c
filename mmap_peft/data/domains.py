"""Data sets of several domains with the same classes: one `datasets.Dataset` a domain, by its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset
from PIL import Image as PILImage

from ..keywords import check_keywords
from ..multitask.task import clean_name


def read_folder(
    path: str | os.PathLike, domains: Sequence[str] | None = None, classes: Sequence[str] | None = None
) -> dict[str, Dataset]:
    """Read domains from a folder of images `path/domain/class/image`, such as `path/Art/Alarm_Clock/00001.jpg`.

    Args:
        path: the folder.
        domains, classes (`Sequence[str]`, *optional*): only these, in this order. They match names on disk that differ
            in case, `_`, `-` and spaces.

    Returns:
        For each domain a data set with the columns `image` (undecoded), `label` and `file` (the path inside the
        folder). All domains have the same classes: those asked for, or those of all of them in alphabetical order.

    Raises:
        ValueError: the folder has no such images, or lacks a domain or class that is asked for.
    """
    root, endings = Path(path), PILImage.registered_extensions()
    folders = sorted(root.glob("*/*"))
    domain_of = _match({folder.parent.name for folder in folders}, domains, root)
    class_of = _match({folder.name for folder in folders}, classes, root)
    folders = [folder for folder in folders if folder.parent.name in domain_of and folder.name in class_of]
    images = [file for folder in folders for file in sorted(folder.glob("*")) if file.suffix.lower() in endings]
    if not images:
        raise ValueError(
            f"{root} has no images of the form domain/class/image, such as Art/Bed/1.jpg; give the domains' folder."
        )
    names = list(classes or sorted({file.parent.name for file in images}))
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names), "file": Value("string")})
    rows: dict[str, list[dict]] = {domain: [] for domain in domains or sorted(domain_of)}
    for file in images:
        row = {"image": str(file), "label": class_of[file.parent.name], "file": file.relative_to(root).as_posix()}
        rows[domain_of[file.parent.parent.name]].append(row)
    return {
        domain: Dataset.from_dict({column: [row[column] for row in in_domain] for column in features}, features)
        for domain, in_domain in rows.items()
        if domains or in_domain
    }


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
    splits = load_dataset(name, revision=revision, token=token, cache_dir=cache_dir)
    data = _with_files(concatenate_datasets(list(splits.values())), name)
    wanted = np.ones(len(data), dtype=bool)
    if classes is not None:
        names = data.features["label"].names
        class_of = _match(set(names), classes, name)
        number_of = np.array([classes.index(class_of[name]) if name in class_of else -1 for name in names])
        labels = number_of[data.with_format("numpy")["label"][:]]
        # The column is added before rows are selected: if added later, all images would be written again.
        data = data.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=list(classes)))
        wanted = labels >= 0
    feature, values = data.features["domain"], data.with_format("numpy")["domain"]
    names = [feature.int2str(int(value)) if isinstance(feature, ClassLabel) else str(value) for value in values]
    domain_of = _match(set(names), domains, name)
    rows = np.array([domain_of.get(name) for name in names], dtype=object)
    return {domain: data.select(np.flatnonzero(wanted & (rows == domain))) for domain in domains or sorted(domain_of)}


def _with_files(data: Dataset, name: str) -> Dataset:
    """The data with the column `file`, or a `ValueError` if a column that `read_hub` needs is missing."""
    for column in ("image", "domain", "label"):
        if column not in data.column_names:
            raise ValueError(
                f"Data set {name!r} has columns {data.column_names}, but no {column!r}; it needs image, domain, label."
            )
    if not isinstance(data.features["label"], ClassLabel):
        raise ValueError(
            f"The labels of data set {name!r} are not a ClassLabel, so its classes have no names; give one with names."
        )
    if "image_path" in data.column_names:
        return data.rename_column("image_path", "file")
    return data.add_column("file", list(map(str, range(len(data)))))


def read_domains(
    data: str, domains: Sequence[str] | None = None, classes: Sequence[str] | None = None
) -> dict[str, Dataset]:
    """Read domains by `read_folder` if `data` is a folder, or else by `read_hub`."""
    return (read_folder if os.path.isdir(data) else read_hub)(data, domains, classes)


def _match(names: set[str], wanted: Sequence[str] | None, source: object) -> dict[str, str]:
    """For each name the wanted name that it matches; the name itself if `wanted` is `None`."""
    if wanted is None:
        return {name: name for name in names}
    plain = {clean_name(name): name for name in wanted}
    matches = {name: plain[clean_name(name)] for name in names if clean_name(name) in plain}
    missing = [name for name in wanted if name not in matches.values()]
    if missing:
        raise ValueError(
            f"{source} lacks {missing[0]!r} and {len(missing) - 1} more of {len(wanted)} names; it has "
            f"{', '.join(sorted(names)[:6]) or 'none'} and so on. Give the data set that has them all."
        )
    return matches

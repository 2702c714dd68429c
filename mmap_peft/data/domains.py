"""Data sets of several domains with the same classes: one `datasets.Dataset` a domain, by its name."""

from __future__ import annotations

import os
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset
from PIL import Image as PILImage


def read_folder(path: str | os.PathLike) -> dict[str, Dataset]:
    """Domains from a folder of images `path/domain/class/image`, such as `path/Art/Alarm_Clock/00001.jpg`.

    Args:
        path: the folder.

    Returns:
        For each domain a data set with the columns `image` (undecoded), `label` and `file` (the path inside the
        folder). All domains have the classes of all of them, in alphabetical order.

    Raises:
        ValueError: the folder has no images in such places.
    """
    root = Path(path)
    endings = set(PILImage.registered_extensions())
    found = sorted(file for file in root.glob("*/*/*") if file.suffix.lower() in endings)
    if not found:
        raise ValueError(
            f"{root} has no images of the form domain/class/image.jpg, such as {root}/Art/Alarm_Clock/00001.jpg; give "
            "the folder that holds the domains."
        )
    classes = sorted({file.parent.name for file in found})
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=classes), "file": Value("string")})
    domains = {}
    for domain in sorted({file.parent.parent.name for file in found}):
        files = [file for file in found if file.parent.parent.name == domain]
        table = {
            "image": [str(file) for file in files],
            "label": [file.parent.name for file in files],
            "file": [file.relative_to(root).as_posix() for file in files],
        }
        domains[domain] = Dataset.from_dict(table, features=features)
    return domains


def read_hub(name: str, **options: str) -> dict[str, Dataset]:
    """Domains from a data set on the Hub with the columns `image`, `domain` and `label`, all splits together.

    Args:
        name: for example `"flwrlabs/office-home"`.
        options: for `datasets.load_dataset`: `revision`, `token`, `cache_dir`.

    Raises:
        ValueError: a column is missing.
    """
    everything = concatenate_datasets(list(load_dataset(name, **options).values()))
    for column in ("image", "domain", "label"):
        if column not in everything.column_names:
            raise ValueError(
                f"Data set {name!r} has the columns {everything.column_names}, but no {column!r}; give one with "
                "image, domain and label."
            )
    feature = everything.features["domain"]
    numbers = everything.with_format("numpy")["domain"]
    values = [feature.int2str(int(value)) if isinstance(feature, ClassLabel) else str(value) for value in numbers]
    everything = everything.add_column("file", [str(number) for number in range(len(everything))])
    return {
        domain: everything.select([row for row, value in enumerate(values) if value == domain])
        for domain in sorted(set(values))
    }


def read_domains(data: str) -> dict[str, Dataset]:
    """Domains from a folder, if there is one of this name, or else from the Hub."""
    return read_folder(data) if os.path.isdir(data) else read_hub(data)

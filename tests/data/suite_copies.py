"""Small data sets in the format of those on the Hub: parquet files with the features of `datasets`."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture


def picture(value):
    return Picture.fromarray(np.full((8, 8, 3), value % 256, dtype=np.uint8))


def write_copy(folder, train, test, kind, image="image", label="label", **splits):
    """Write a data set of the splits `train`, `test` and others.

    Args:
        train, test: the labels of the images of a split.
        kind: feature of the labels: the names of the classes, or a dtype.
        image, label: names of the columns.
    """
    feature = Value(kind) if isinstance(kind, str) else ClassLabel(names=kind)
    for split, labels in {"train": train, "test": test, **splits}.items():
        columns = {image: [picture(9 * row) for row in range(len(labels))], label: labels, "key": list(labels)}
        features = Features({image: Image(), label: feature, "key": feature})
        (folder / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder

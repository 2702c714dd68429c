"""Images of several tasks as one data set for a DataLoader."""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torch.utils.data import default_collate as collate  # noqa: F401, items of TaskImages as one batch

from .image_cache import ImageCache
from .preprocessing import Preprocessing
from .task import Task


logger = logging.getLogger(__name__)

IGNORE_INDEX = -100  # label of an image that could not be read: cross entropy and accuracy leave it out


class TaskImages(Dataset):
    """The images of one split of all tasks, one task after the other, ready for the model.

    An item is `{"pixel_values": (3, H, W), "labels": number of the class, "task_ids": number of the task}`. `collate`
    makes a batch of items.

    Args:
        tasks (`Sequence[Task]`), split (`str`): the tasks, and `"train"` or `"eval"`.
        image_processor: CLIP's image processor.
        unreadable (`str`): what to do with a file that is no image: `"refuse"` raises a `ValueError` with its name,
            `"skip"` names it in a warning and leaves it out of loss and accuracy.
        only (`Collection[str]`, *optional*): names of the tasks whose images are used. All tasks keep their numbers.
        cache_bytes (`float`): largest size of the `ImageCache` of resized images. No images are kept if the processor
            cannot run in two steps (see `Preprocessing`).
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        split: str,
        image_processor: Any,
        unreadable: str = "refuse",
        only: Collection[str] | None = None,
        cache_bytes: float = 4e9,
    ) -> None:
        if unreadable not in ("refuse", "skip"):
            raise ValueError(f"unreadable={unreadable!r} is no choice; write 'refuse' or 'skip'.")
        self.tasks, self.unreadable = list(tasks), unreadable
        self.data = [_undecoded(getattr(task, split)) if only is None or task.name in only else () for task in tasks]
        self.sizes = [len(data) for data in self.data]
        self.starts = np.cumsum([0, *self.sizes])
        self._preprocessing = Preprocessing(image_processor)
        shape = self._preprocessing.shape
        self._cache = ImageCache(len(self) if shape else 0, shape or (), cache_bytes)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        task_id = int(np.searchsorted(self.starts, index, side="right")) - 1
        row = self.data[task_id][int(index - self.starts[task_id])]
        item = {"labels": int(row["label"]), "task_ids": task_id}
        resized = self._cache.get(index)
        if resized is None:
            try:
                image = _decoded(row["image"])
            except Exception as error:  # decoders raise different exceptions for broken files
                self._report(error, row["image"], index, task_id)
                image, item["labels"] = Image.new("RGB", (32, 32)), IGNORE_INDEX
            resized = self._preprocessing.resize(image)
            if resized is None:
                return {**item, "pixel_values": self._preprocessing(image)}
            if item["labels"] != IGNORE_INDEX:
                self._cache.put(index, resized)
        return {**item, "pixel_values": self._preprocessing.normalise(resized)}

    def _report(self, error: Exception, image: Any, index: int, task_id: int) -> None:
        path = image.get("path") if isinstance(image, dict) else getattr(image, "filename", image)
        name = path if path and isinstance(path, (str, Path)) else f"number {index - self.starts[task_id]}"
        message = f"Image {name} of task {self.tasks[task_id].name!r} cannot be read ({error})"
        if self.unreadable == "refuse":
            raise ValueError(f"{message}; repair or remove it, or choose unreadable='skip'.") from error
        logger.warning("%s; it is left out.", message)


def _undecoded(data: Any) -> Any:
    # Decoded here and not by `datasets`, so that an error can name the file.
    if isinstance(data, datasets.Dataset) and isinstance(data.features.get("image"), datasets.Image):
        return data.cast_column("image", datasets.Image(decode=False))
    return () if data is None else data


def _decoded(image: Any) -> Image.Image:
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    return (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")

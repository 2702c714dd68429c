"""Images of several tasks as one data set for a DataLoader."""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .image_cache import ImageCache
from .preprocessing import Preprocessing
from .task import Task


logger = logging.getLogger(__name__)

IGNORED = -100  # label of an image that could not be read: cross entropy and accuracy leave it out


class TaskImages(Dataset):
    """The images of one split of all tasks, one task after the other, ready for the model.

    An item is `{"pixel_values": (3, H, W), "labels": number of the class, "task_ids": number of the task}`.

    Args:
        tasks (`Sequence[Task]`): the tasks.
        split (`str`): `"train"` or `"eval"`.
        image_processor: CLIP's image processor.
        unreadable (`str`): what to do with a file that is no image: `"refuse"` raises an error with its name,
            `"skip"` names it in a warning and leaves it out of loss and accuracy.
        only (`Collection[str]`, *optional*): names of the tasks whose images there are; the others keep their numbers.
        cache_bytes (`float`): resized images are kept on disk, for all workers and epochs, as many as fit into so
            many bytes (`ImageCache`); none if the processor cannot be taken in two steps (`Preprocessing`).
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
        chosen = [only is None or task.name in only for task in self.tasks]
        self.data = [_undecoded(getattr(task, split)) if here else None for task, here in zip(self.tasks, chosen)]
        self.sizes = [0 if data is None else len(data) for data in self.data]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._preprocessing = Preprocessing(image_processor)
        shape = self._preprocessing.shape
        self._cache = ImageCache(0 if shape is None else len(self), shape or (), cache_bytes)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        task_id = int(np.searchsorted(self.starts, index, side="right")) - 1
        row_number = int(index - self.starts[task_id])
        row = self.data[task_id][row_number]
        item = {"labels": int(row["label"]), "task_ids": task_id}
        resized = self._cache.get(index)
        if resized is None:
            try:
                image = _decoded(row["image"])
            except Exception as error:  # whatever a decoder may raise on a broken file
                name = _name(row["image"]) or f"number {row_number}"
                message = f"Image {name} of task {self.tasks[task_id].name!r} cannot be read ({error})"
                if self.unreadable == "refuse":
                    raise ValueError(f"{message}; mend or remove it, or choose unreadable='skip'.") from error
                logger.warning("%s; it is left out.", message)
                image, item["labels"] = Image.new("RGB", (32, 32)), IGNORED
            resized = self._preprocessing.resize(image)
            if resized is None:
                item["pixel_values"] = self._preprocessing(image)
                return item
            if item["labels"] != IGNORED:
                self._cache.put(index, resized)
        item["pixel_values"] = self._preprocessing.normalise(resized)
        return item


def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Items of `TaskImages` as one batch."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
        "task_ids": torch.tensor([item["task_ids"] for item in items]),
    }


def _undecoded(data: Any) -> Any:
    # Decoded by us, not by `datasets`, so that an error can name the file.
    if isinstance(data, datasets.Dataset) and isinstance(data.features.get("image"), datasets.Image):
        return data.cast_column("image", datasets.Image(decode=False))
    return data


def _decoded(image: Any) -> Image.Image:
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    return image.convert("RGB")


def _name(image: Any) -> str | None:
    if isinstance(image, dict):
        return image.get("path")
    return str(image) if isinstance(image, (str, Path)) else getattr(image, "filename", None)

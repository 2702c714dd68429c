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
        cache_bytes (`int`): processed images are kept in memory if all of them fit into this many bytes.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        split: str,
        image_processor: Any,
        unreadable: str = "refuse",
        only: Collection[str] | None = None,
        cache_bytes: int = 2**30,
    ) -> None:
        if unreadable not in ("refuse", "skip"):
            raise ValueError(f"unreadable={unreadable!r} is no choice; write 'refuse' or 'skip'.")
        self.tasks, self.image_processor, self.unreadable = list(tasks), image_processor, unreadable
        chosen = [only is None or task.name in only for task in self.tasks]
        self.data = [_undecoded(getattr(task, split)) if here else None for task, here in zip(self.tasks, chosen)]
        self.sizes = [0 if data is None else len(data) for data in self.data]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.cache_bytes = cache_bytes
        self._cache: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._cache:
            return self._cache[index]
        task_id = int(np.searchsorted(self.starts, index, side="right")) - 1
        row_number = int(index - self.starts[task_id])
        row = self.data[task_id][row_number]
        item = {"labels": int(row["label"]), "task_ids": task_id}
        try:
            image = _decoded(row["image"])
        except Exception as error:  # whatever a decoder may raise on a broken file
            name = _name(row["image"]) or f"number {row_number}"
            message = f"Image {name} of task {self.tasks[task_id].name!r} cannot be read ({error})"
            if self.unreadable == "refuse":
                raise ValueError(f"{message}; mend or remove it, or choose unreadable='skip'.") from error
            logger.warning("%s; it is left out.", message)
            image, item["labels"] = Image.new("RGB", (32, 32)), IGNORED
        item["pixel_values"] = self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
        if len(self) * item["pixel_values"].nbytes <= self.cache_bytes:
            self._cache[index] = item
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

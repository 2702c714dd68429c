"""Images of several tasks as one data set for a DataLoader."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torch.utils.data import default_collate as collate  # items of TaskImages as one batch
from transformers.utils.logging import tqdm

from ..checking import shortened
from .decoding import decode, is_stored, named
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
        self.data = [task.rows(split) if only is None or task.name in only else None for task in tasks]
        self.sizes = [0 if rows is None else len(rows) for rows in self.data]
        self.starts = np.cumsum([0, *self.sizes])
        self._preprocessing = Preprocessing(image_processor)
        shape = self._preprocessing.shape
        self._cache = ImageCache(len(self) if shape else 0, shape or (), cache_bytes)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        task_id = int(np.searchsorted(self.starts, index, side="right")) - 1
        rows, number = self.data[task_id], int(index - self.starts[task_id])
        resized = self._cache.get(index) if rows.stored else None
        if resized is not None:
            item = {"labels": int(rows.labels[number]), "task_ids": task_id}
            return {**item, "pixel_values": self._preprocessing.normalise(resized)}
        picture = None
        try:
            picture, label = rows[number]
            image = decode(picture)
        except Exception as error:  # a user's transform can raise anything
            self._report(error, rows.file(number) if picture is None else picture, number, task_id)
            image, label = Image.new("RGB", (32, 32)), IGNORE_INDEX
        item = {"labels": label, "task_ids": task_id}
        resized = self._preprocessing.resize(image)
        if resized is None:
            return {**item, "pixel_values": self._preprocessing(image)}
        if label != IGNORE_INDEX and rows.stored and is_stored(picture):
            self._cache.put(index, resized)
        return {**item, "pixel_values": self._preprocessing.normalise(resized)}

    def batches(self, rows: Sequence[int], size: int, description: str) -> Iterator[dict[str, Any]]:
        """Batches of `size` of these images, with a progress bar."""
        for start in tqdm(range(0, len(rows), size), desc=description):
            yield collate([self[int(row)] for row in rows[start : start + size]])

    def _report(self, error: Exception, picture: Any, number: int, task_id: int) -> None:
        reason = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        message = (
            f"Image {named(picture) or f'number {number}'} of task {shortened(self.tasks[task_id].name)} cannot be "
            f"read ({' '.join(reason.split())[:150]})"
        )
        if self.unreadable == "refuse":
            raise ValueError(f"{message}; repair or remove it, or choose unreadable='skip'.") from error
        logger.warning("%s; it is left out.", message)

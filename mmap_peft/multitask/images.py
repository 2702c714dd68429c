"""Images of several tasks as one data set for a DataLoader."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
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
        cache_bytes (`float`): largest size of an `ImageCache` of resized images. No images are kept if the processor
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
        self.preprocessing, self._cache_bytes = Preprocessing(image_processor), cache_bytes
        self._caches: dict[tuple[int, ...], ImageCache] = {}
        self._cache = self.cache(self.preprocessing.shape or ())

    def __len__(self) -> int:
        return int(self.starts[-1])

    def cache(self, shape: tuple[int, ...]) -> ImageCache:
        """The cache of byte arrays of a shape, one for each image; without a shape it keeps nothing."""
        if shape not in self._caches:
            self._caches[shape] = ImageCache(len(self) if shape else 0, shape, self._cache_bytes)
        return self._caches[shape]

    def limit_cache(self, most_bytes: float) -> None:
        """Let each cache take less from now on; what larger ones hold is lost."""
        if most_bytes < self._cache_bytes:
            self._cache_bytes, self._caches = most_bytes, {}
            self._cache = self.cache(self.preprocessing.shape or ())

    def __getitem__(self, index: int) -> dict[str, Any]:
        resized, image, item = self._resized(index)
        pixels = self.preprocessing(image) if resized is None else self.preprocessing.normalise(resized)
        return {**item, "pixel_values": pixels}

    def task_and_number(self, index: int) -> tuple[int, int]:
        """The number of an image's task, and the number of the image in it."""
        task_id = int(np.searchsorted(self.starts, index, side="right")) - 1
        return task_id, int(index - self.starts[task_id])

    def as_bytes(self, index: int) -> dict[str, Any]:
        """An item before it is normalized, with `"pictures"`, (3, H, W) of uint8, in place of `"pixel_values"`, if the
        image processor can run in two steps."""
        resized, _, item = self._resized(index)
        return {**item, "pictures": resized}

    def _resized(self, index: int) -> tuple[np.ndarray | None, Image.Image | None, dict[str, Any]]:
        return self.read(index, self.preprocessing.resize, self._cache)

    def read(
        self, index: int, resize: Callable[[Image.Image], np.ndarray | None], cache: ImageCache
    ) -> tuple[np.ndarray | None, Image.Image | None, dict[str, Any]]:
        """What `resize` makes of an image, or the cache has kept of it; the image, if it was read; labels and task."""
        task_id, number = self.task_and_number(index)
        rows = self.data[task_id]
        resized = cache.get(index) if rows.stored else None
        if resized is not None:
            return resized, None, {"labels": int(rows.labels[number]), "task_ids": task_id}
        picture = None
        try:
            picture, label = rows[number]
            image = decode(picture)
        except Exception as error:  # a user's transform can raise anything
            self._report(error, rows.file(number) if picture is None else picture, number, task_id)
            image, label = Image.new("RGB", (32, 32)), IGNORE_INDEX
        resized = resize(image)
        if resized is not None and label != IGNORE_INDEX and rows.stored and is_stored(picture):
            cache.put(index, resized)
        return resized, image, {"labels": label, "task_ids": task_id}

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

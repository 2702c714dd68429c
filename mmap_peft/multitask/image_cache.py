"""Resized images in a file that all processes share."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


logger = logging.getLogger(__name__)


class ImageCache:
    """Arrays of bytes by number, in a file in the folder for temporary files (`TMPDIR`).

    Every process opens the file by its path when it first needs it. So workers of a `DataLoader`, forked or spawned,
    see what others have kept, and those of the next epoch as well. Disk is taken by what is kept only. The file goes
    with the object that made it, or with its process.

    Args:
        count (`int`): how many arrays there are; the first ones, numbered from 0, are kept.
        shape (`Sequence[int]`): of each array.
        most_bytes (`float`): disk for the file, at most; never more than a quarter of what is free.
    """

    def __init__(self, count: int, shape: Sequence[int], most_bytes: float) -> None:
        # The mark is set once all bytes of a row are there, so that no process reads half a row.
        self._row = np.dtype([("whole", np.uint8), ("pixels", np.uint8, tuple(shape))])
        free = shutil.disk_usage(tempfile.gettempdir()).free
        self.count = min(count, int(min(most_bytes, free / 4) // self._row.itemsize))
        self._rows: np.ndarray | None = None
        if self.count:
            self.path = Path(tempfile.mkdtemp(prefix="mmap_peft_"), "images")
            with open(self.path, "wb") as file:
                file.truncate(self.count * self._row.itemsize)
            weakref.finalize(self, _remove, self.path.parent, os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def get(self, number: int) -> np.ndarray | None:
        """The array of a number, which is not to be written to, or `None`."""
        if number >= self.count:
            return None
        if self._rows is None:
            try:
                self._rows = np.memmap(self.path, self._row, "r")
            except OSError as error:
                return self._stop(error)
        row = self._rows[number]
        return row["pixels"] if row["whole"] else None

    def put(self, number: int, pixels: np.ndarray) -> None:
        """Keep an array, if there is room for its number."""
        if number >= self.count:
            return
        try:
            # Not through the memory map: there a full disk ends the process.
            with open(self.path, "r+b") as file:
                file.seek(number * self._row.itemsize + 1)
                file.write(pixels.tobytes())
                file.flush()
                file.seek(number * self._row.itemsize)
                file.write(b"\1")
        except OSError as error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        logger.warning("No more images are kept: %s", error)
        self.count = 0


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a worker, which was forked with the finaliser
        shutil.rmtree(folder, ignore_errors=True)

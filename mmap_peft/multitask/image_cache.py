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
    """Keeps `count` byte arrays of one shape, by number, in a file in the folder for temporary files (`TMPDIR`).

    Every process opens the file by its path, so workers of a `DataLoader`, forked or spawned, read what others have
    written, in later epochs as well. The file is deleted with the object that created it, or when its process ends.
    It takes disk space only for arrays that are written, at most `most_bytes` and a quarter of the free space. If that
    is not enough for all arrays, those with the smallest numbers are kept.
    """

    def __init__(self, count: int, shape: Sequence[int], most_bytes: float) -> None:
        # `whole` is set once all bytes of a row are written, so that no process reads half a row.
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
        """The array with a number, read-only, or `None`."""
        if number >= self.count:
            return None
        try:
            self._rows = np.memmap(self.path, self._row, "r") if self._rows is None else self._rows
        except OSError as error:
            return self._stop(error)
        whole, pixels = self._rows[number]
        return pixels if whole else None

    def put(self, number: int, pixels: np.ndarray) -> None:
        """Keep an array, if there is space for its number."""
        if number >= self.count:
            return
        try:
            # Not through the memory map: there a full disk ends the process.
            with open(self.path, "r+b") as file:
                for offset, content in ((1, pixels.tobytes()), (0, b"\1")):
                    file.seek(number * self._row.itemsize + offset)
                    file.write(content)
                    file.flush()
        except OSError as error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        logger.warning("No more images are kept: %s", error)
        self.count = 0


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker has the finaliser, too
        shutil.rmtree(folder, ignore_errors=True)

"""Resized images in a file that all processes share."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .replacing import lock


logger = logging.getLogger(__name__)

PREFIX = "mmap_peft_"


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
        self._file: int | None = None  # opened by each process
        self.count = count
        try:
            free = shutil.disk_usage(tempfile.gettempdir()).free
            self.count = min(count, int(min(most_bytes, free / 4) // self._row.itemsize))
            if self.count:
                self._create()
        except OSError as error:
            self._stop(error)

    def _create(self) -> None:
        _remove_leftovers(Path(tempfile.gettempdir()))
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        stack = contextlib.ExitStack()
        stack.enter_context(lock(folder))  # until the process ends
        weakref.finalize(self, _remove, folder, os.getpid(), stack)
        self.path = folder / "images"
        with open(self.path, "wb") as file:
            file.truncate(self.count * self._row.itemsize)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def get(self, number: int) -> np.ndarray | None:
        """The array with a number, read-only, or `None`."""
        if number >= self.count:
            return None
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._file)
            # Not through a memory map: a file that somebody cuts would end the process.
            content = os.pread(self._file, self._row.itemsize, number * self._row.itemsize)
        except OSError as error:
            return self._stop(error)
        if len(content) < self._row.itemsize or not content[0]:
            return None
        return np.frombuffer(content, self._row)[0]["pixels"]

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


def _remove(folder: Path, owner: int, stack: contextlib.ExitStack) -> None:
    if os.getpid() == owner:  # a forked worker has the finaliser, too
        shutil.rmtree(folder, ignore_errors=True)
        stack.close()


def _remove_leftovers(folder: Path) -> None:
    """Remove the files of processes that were killed: nobody has their locks."""
    for leftover in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), lock(leftover, seconds=0):
            shutil.rmtree(leftover, ignore_errors=True)

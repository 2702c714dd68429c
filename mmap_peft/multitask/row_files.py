"""Rows of bytes by a key, in files that processes and runs share."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import weakref
import zlib
from pathlib import Path
from typing import Any

from .replacing import is_locked


logger = logging.getLogger(__name__)

KEY_BYTES = 16
_RECORD = KEY_BYTES + 4  # in a file of keys: the key, and the CRC-32 of key and row
ROWS, KEYS = ".rows", ".keys"

Place = tuple[Path, int, int]  # a file without its ending, the number of a row in it, its checksum


def root_folder() -> Path:
    """The folder in that for temporary files (`TMPDIR`) which holds the folders of all `RowFiles` of this user."""
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir(), f"mmap_peft-features-{owner}")


class RowFiles:
    """Rows of one size by key, in a folder of `root_folder`.

    Each process that writes has two files of its own: `*.rows`, and `*.keys` with the key and the checksum of each
    row, which is written after the row. So processes need not wait for each other, and what is left of a process that
    was killed is whole or has no valid checksum. Rows are never changed; one with a wrong checksum counts as missing.

    All folders together take at most `most_bytes` of disk space and a quarter of what is free. Folders that were not
    used for the longest time are removed to make space, except those that a process has open.

    Args:
        name (`str`): name of the folder: equal for what may share rows.
        row_bytes (`int`): size of a row.
        most_bytes (`float`): largest size of all folders.
        needed_bytes (`float`): how much space is needed at most; older folders are removed for it.
    """

    def __init__(self, name: str, row_bytes: int, most_bytes: float, needed_bytes: float = 0.0) -> None:
        self.row_bytes, self.most_bytes = row_bytes, most_bytes
        self.folder = root_folder() / name
        self._forget()
        try:
            root = self.folder.parent
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if hasattr(os, "getuid") and root.stat().st_uid != os.getuid():
                raise OSError(f"{root} belongs to another user")
            self.most_bytes = min(most_bytes, used_bytes(root) + shutil.disk_usage(root).free / 4)
            weakref.finalize(self, os.close, _open_folder(self.folder))
            needed_bytes -= used_bytes(self.folder)
            _make_space(root, min(needed_bytes, self.most_bytes), self.most_bytes, self.folder)
        except OSError as error:
            self._stop(error)

    def _forget(self) -> None:
        self._found: dict[bytes, list[Place]] = {}
        self._seen: dict[Path, int] = {}  # bytes of each file of keys that were read
        self._open: dict[Path, int] = {}  # file descriptors of the files of rows
        self._writer: tuple[int, Path, int, int] | None = None  # process, file, descriptors of rows and keys

    def __getstate__(self) -> dict[str, Any]:
        return {"row_bytes": self.row_bytes, "most_bytes": self.most_bytes, "folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def free_bytes(self) -> float:
        """How much more can be written."""
        return self.most_bytes - used_bytes(self.folder.parent)

    def __len__(self) -> int:
        """Number of keys."""
        self._scan()
        return len(self._found)

    def __contains__(self, key: bytes) -> bool:
        if key not in self._found:
            self._scan()
        return key in self._found

    def get(self, key: bytes, row: memoryview) -> bool:
        """Read the row of a key into `row`; returns whether there is one."""
        while key in self:
            place = self._found[key][0]
            if self._read(place, row) and zlib.crc32(row, zlib.crc32(key)) == place[2]:
                return True
            self._found[key].remove(place)
            if not self._found[key]:
                del self._found[key]
        return False

    def put(self, key: bytes, row: memoryview) -> bool:
        """Keep a row, if there is space for it and none of this key; returns whether it is kept."""
        if key in self:
            return True
        if self.row_bytes + _RECORD > self.free_bytes:
            return False
        checksum = zlib.crc32(row, zlib.crc32(key))
        try:
            if self._writer is None or self._writer[0] != os.getpid():  # a forked process has its own files
                self._writer = self._new_writer()
            _, stem, rows, keys = self._writer
            number = os.fstat(keys).st_size // _RECORD
            _write(rows, row, number * self.row_bytes)
            _write(keys, key + checksum.to_bytes(4, "little"), number * _RECORD)
        except OSError as error:
            self._stop(error)
            return False
        self._seen[stem] = (number + 1) * _RECORD
        self._found.setdefault(key, []).append((stem, number, checksum))
        return True

    def _new_writer(self) -> tuple[int, Path, int, int]:
        rows, path = tempfile.mkstemp(ROWS, f"{os.getpid()}-", self.folder)
        stem = Path(path).with_suffix("")
        keys = os.open(stem.with_suffix(KEYS), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        for descriptor in (rows, keys):
            weakref.finalize(self, os.close, descriptor)
        return os.getpid(), stem, rows, keys

    def _scan(self) -> None:
        """Take note of the keys that were written since."""
        try:
            files = [Path(entry.path) for entry in os.scandir(self.folder) if entry.name.endswith(KEYS)]
            for path in files:
                stem = path.with_suffix("")
                seen = self._seen.get(stem, 0)
                if path.stat().st_size < seen + _RECORD:
                    continue
                with open(path, "rb") as file:
                    file.seek(seen)
                    content = file.read()
                for start in range(0, len(content) - _RECORD + 1, _RECORD):
                    key, checksum = content[start : start + KEY_BYTES], content[start + KEY_BYTES : start + _RECORD]
                    place = stem, (seen + start) // _RECORD, int.from_bytes(checksum, "little")
                    self._found.setdefault(key, []).append(place)
                self._seen[stem] = seen + len(content) // _RECORD * _RECORD
        except OSError:  # somebody has removed the folder
            self._found, self._seen = {}, {}

    def _read(self, place: Place, row: memoryview) -> bool:
        stem, number, _ = place
        try:
            if stem not in self._open:
                self._open[stem] = os.open(stem.with_suffix(ROWS), os.O_RDONLY)
                weakref.finalize(self, os.close, self._open[stem])
            # Not through a memory map: a file that somebody cuts would end the process.
            return os.preadv(self._open[stem], [row], number * self.row_bytes) == len(row)
        except OSError:
            return False

    def _stop(self, error: OSError) -> None:
        logger.warning("No more image features are kept: %s", error)
        self.most_bytes = 0


def used_bytes(folder: Path) -> int:
    """Size of all files of a folder and of those in it."""
    total = 0
    try:
        for entry in os.scandir(folder):
            total += used_bytes(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else entry.stat().st_size
    except OSError:  # another process removes it
        pass
    return total


def _write(file: int, content: memoryview | bytes, offset: int) -> None:
    """Write all of it. Not through a memory map: there a full disk ends the process."""
    content = memoryview(content)
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def _open_folder(folder: Path) -> int:
    """Create a folder, or mark it as used, and open it with a lock so that no other process removes it."""
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if is_locked(descriptor, shared=True) and os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
                os.utime(folder)
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)
        time.sleep(0.01)  # another process is removing it


def _make_space(root: Path, needed: float, most: float, kept: Path) -> None:
    """Remove the folders that nobody has open, those first that were not used for the longest time."""
    others = [Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and entry.name != kept.name]
    for folder in sorted(others, key=lambda each: each.stat().st_mtime):
        if used_bytes(root) + needed <= most:
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            if is_locked(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)

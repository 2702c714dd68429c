"""Replaces several files of a folder at once: whatever ends the process, the folder holds the old or the new ones.

New files are written into a folder `.saving-<main file>-*` beside the old ones. Renaming the main file, which has the
SHA-256 of the others, is the moment when the new ones count; then the others are moved, too. Until they are, `find`
returns those in `.saving-*`.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows: two processes that save into one folder are not kept apart
    fcntl = None

PREFIX = ".saving-"
DIGESTS = "files"  # in the main file: the SHA-256 of each other file, by its path in the folder
LONGEST_WAIT = 60  # seconds


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, in hexadecimal digits. Raises an `OSError` that names the file if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    except OSError as error:
        error.filename = str(path)  # reading, other than opening, does not say which file it was
        raise
    return digest.hexdigest()


def find(folder: Path, name: str, digest: str | None) -> Path:
    """The path of a file of the folder; if a digest is given, one in `.saving-*` that has it comes before another."""
    path = folder / name
    if digest is not None:
        # The first place once more at the end: another process may have moved the file there meanwhile.
        for candidate in (path, *(leftover / name for leftover in folder.glob(f"{PREFIX}*")), path):
            with contextlib.suppress(OSError):
                if candidate.is_file() and sha256(candidate) == digest:
                    return candidate
    return path


@contextlib.contextmanager
def replace_files(folder: Path, main: str) -> Iterator[Path]:
    """Replace files of a folder, which is created, by those that the `with` block writes into the path that it gets.

    Args:
        folder (`Path`): the folder. Its other files stay.
        main (`str`): name of the main file, a JSON object with `DIGESTS`.

    Raises:
        OSError: a file cannot be written, or another process writes into the folder for a minute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        _settle(folder, main)
        new, inode = Path(tempfile.mkdtemp(dir=folder, prefix=f"{PREFIX}{main}-")), None
        try:
            yield new
            files = [path for path in new.rglob("*") if path.is_file()]
            for path in files:
                (folder / path.relative_to(new)).parent.mkdir(exist_ok=True)
                flush(path)
            inode = (new / main).stat().st_ino
            os.replace(new / main, folder / main)
        except BaseException:
            # An interrupt can come after the main file was renamed.
            if inode is None or not (folder / main).exists() or (folder / main).stat().st_ino != inode:
                shutil.rmtree(new, ignore_errors=True)
            raise
        for path in files:
            if path != new / main:
                os.replace(path, folder / path.relative_to(new))
        shutil.rmtree(new, ignore_errors=True)
        flush(folder)


def _settle(folder: Path, main: str) -> None:
    """Move the files that count, and remove the others, of processes that ended while they saved."""
    leftovers = list(folder.glob(f"{PREFIX}{glob.escape(main)}-*"))
    digests = read_digests(folder / main) if leftovers else {}
    for name, digest in digests.items():
        found = find(folder, name, digest)
        if found != folder / name and found.is_file():
            os.replace(found, folder / name)
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)


def read_digests(path: Path) -> Mapping[str, str]:
    """The digests in a main file, by the names of files inside its folder; none if it cannot be read."""
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))[DIGESTS]
        return {name: str(digest) for name, digest in digests.items() if {"..", "/"}.isdisjoint(Path(name).parts)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def flush(path: Path) -> None:
    """Write a file or a folder's entries to the disk, so that they outlast a power failure."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # not every system has folders
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes what can be written
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def lock(folder: Path, seconds: float = LONGEST_WAIT) -> Iterator[None]:
    """Inside the `with` block no other process has this lock of the folder. It ends with its process, too.

    Raises:
        OSError: another process has held it for this many seconds.
    """
    if fcntl is None:
        yield
        return
    descriptor, end = os.open(folder, os.O_RDONLY), time.monotonic() + seconds
    try:
        while not is_locked(descriptor):
            if time.monotonic() > end:
                raise OSError(f"Another process has been saving into {folder} for {seconds} s; try again later.")
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def is_locked(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file or folder without waiting, `shared` with others that share it; returns whether it was."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True

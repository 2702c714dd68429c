"""Text files that list images, with lines `Art/Alarm_Clock/00001.jpg 0`."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .folders import short


_LINE = re.compile(r"\s*([^/]+/([^/]+)/[^/]*[^/\s])\s+([0-9]{1,9})\s*")
_NAME = re.compile(r"\s*([^/]+/[^/]+/[^/]*?[^/\s])(\s+[0-9]{1,9})?\s*")


def path_text(path: str | os.PathLike) -> str:
    """A path as it is written in errors: not too long."""
    return short(path)[1:-1]


class ListReader:
    """Reads lists that number their classes alike."""

    def __init__(self) -> None:
        self._label_of: dict[str, int] = {}
        self._class_of: dict[int, str] = {}

    def read(self, path: Path) -> list[str]:
        """The files that a list names.

        Raises:
            OSError: the list is missing or may not be read.
            ValueError: it is no text in UTF-8, a line is not of the form `Domain/Class/file label`, numbers a class
                otherwise than a line before, or names a file again.
        """
        files: dict[str, None] = {}
        for line in filter(str.strip, _text(path).split("\n")):
            found = _LINE.fullmatch(line)
            if not found:
                raise ValueError(
                    f"Line {short(line)} of {path_text(path)} is not of the form Domain/Class/file label."
                )
            file, name, label = found[1], found[2], int(found[3])
            if self._label_of.setdefault(name, label) != label or self._class_of.setdefault(label, name) != name:
                other = short(self._class_of[label]) if label in self._class_of else "none"
                raise ValueError(
                    f"Line {short(line)} of {path_text(path)} gives {short(name)} the label {label}, but elsewhere "
                    f"its label is {self._label_of[name]}, and {label} is the label of {other}; number classes alike."
                )
            if file in files:
                raise ValueError(f"{path_text(path)} names {short(file)} twice; leave out one of the lines.")
            files[file] = None
        return list(files)


def read_names(path: Path) -> list[str]:
    """The files that a list names, each once, with or without a label behind the name.

    Raises:
        OSError: the list is missing or may not be read.
        ValueError: it is no text in UTF-8, or a line is not of the form `Domain/Class/file`.
    """
    files: dict[str, None] = {}
    for line in filter(str.strip, _text(path).split("\n")):
        found = _NAME.fullmatch(line)
        if not found:
            raise ValueError(f"Line {short(line)} of {path_text(path)} is not of the form Domain/Class/file.")
        files[found[1]] = None
    return list(files)


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{path_text(path)} is no file; give lists as text files.")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path_text(path)} is no UTF-8 from byte {error.start} on; save it in UTF-8.") from None

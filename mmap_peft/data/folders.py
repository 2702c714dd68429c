"""Folders of images: which files are images, and which of their folders are domains, splits and classes."""

from __future__ import annotations

import errno
import mimetypes
import os
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..multitask.task import clean_name


LAYOUTS = ("class", "domain/class", "split/class", "domain/split/class", "split/domain/class")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}  # what a split's folder may be called

# What systems and programs put beside images.
_HIDDEN = re.compile(r"\..*|.*~|@eaDir|__MACOSX|__pycache__|lost\+found|#recycle|\$RECYCLE\.BIN|Thumbs\.db", re.DOTALL)
_NEVER_READ = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF"}  # formats that Pillow knows by name only
_short = reprlib.Repr()
_short.maxstring = 100

Parts = tuple[str, ...]


def short(value: object) -> str:
    """A name as it is written in errors: quoted, and not too long."""
    return _short.repr(str(value))


def spelling(name: str) -> str:
    """What names have in common that differ in case, `_`, `-`, spaces, or the composition of Unicode characters."""
    return clean_name(unicodedata.normalize("NFC", name))


def is_hidden(name: str) -> bool:
    """Whether a name is one of those that systems and programs hide, such as `._1.jpg` or `.ipynb_checkpoints`."""
    return _HIDDEN.fullmatch(name) is not None


@dataclass
class ImageTree:
    """The images in a folder, at any depth. Hidden files and folders are left out.

    Attributes:
        root: the folder.
        images: names of the images in each folder. A folder is given by the names that lead to it from `root`.
        real: for each folder, its path without links.
        unreadable: folders that cannot be read, with the reason.
        passed_over: files that look like images but are none, and links that lead nowhere or round in a circle.
        links: whether there are links, so that one image can be found twice.
    """

    root: Path
    images: dict[Parts, list[str]] = field(default_factory=dict)
    real: dict[Parts, str] = field(default_factory=dict)
    unreadable: dict[Parts, str] = field(default_factory=dict)
    passed_over: list[Parts] = field(default_factory=list)
    links: bool = False

    @classmethod
    def scan(cls, root: Path) -> ImageTree:
        """Read the names of all files, without opening one.

        Raises:
            OSError: `root` is missing, is no folder, or cannot be read.
        """
        if not os.path.isdir(root):
            raise OSError(f"{short(root)} is no folder; give a folder of images.")
        tree, formats = cls(root), Image.registered_extensions()
        endings = {ending for ending, kind in formats.items() if kind not in _NEVER_READ}
        stack: list[tuple[Parts, list[str]]] = [((), [os.path.realpath(root)])]
        while stack:
            parts, above = stack.pop()
            try:
                for name, real in tree._read(parts, above, endings):
                    stack.append(((*parts, name), [*above, real]))
            except OSError as error:
                tree.unreadable[parts] = error.strerror or str(error)
        if () in tree.unreadable:
            raise OSError(f"Folder {short(root)} cannot be read ({tree.unreadable[()]}); give a folder of images.")
        return tree

    def _read(self, parts: Parts, above: Sequence[str], endings: Collection[str]) -> list[tuple[str, str]]:
        """Read one folder; returns the names and real paths of the folders in it."""
        path, images, folders = os.path.join(self.root, *parts), [], []
        with os.scandir(path) as found:
            entries = [entry for entry in found if not is_hidden(entry.name)]
        if not os.access(path, os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        for entry in entries:
            ending = os.path.splitext(entry.name)[1].lower()
            link = entry.is_symlink()
            self.links |= link
            kind = _kind(entry)
            if kind == "folder":
                real = os.path.realpath(entry.path) if link else os.path.join(above[-1], entry.name)
                if link and any(folder == real or folder.startswith(real.rstrip("/") + "/") for folder in above):
                    self.passed_over.append((*parts, entry.name))
                else:
                    folders.append((entry.name, real))
            elif kind == "file" and ending in endings:
                images.append(entry.name)
            elif (link and kind is None) or ending in endings or _looks_like_image(entry.name):
                self.passed_over.append((*parts, entry.name))
        self.images[parts], self.real[parts] = sorted(images), above[-1]
        return folders

    def layout(self, *wanted: Sequence[str] | None) -> list[str]:
        """What the levels of folders are, such as `["domain", "class"]`.

        Args:
            wanted: names of domains and of classes; images in none of these folders do not count.

        Raises:
            OSError: all folders are wanted, and one cannot be read.
            ValueError: no layout of `LAYOUTS` fits, or several may.
        """
        if not any(wanted):
            self.check_readable(lambda parts: True)
        folders = {parts: len(names) for parts, names in self.images.items() if names}
        for names in wanted:
            keys = set(map(spelling, names or ()))
            folders = {parts: folders[parts] for parts in folders if keys & set(map(spelling, parts))} or folders
        if not folders:
            return ["domain", "class"]
        depths: Counter[int] = Counter()
        for parts, count in folders.items():
            depths[len(parts)] += count
        depth = max(depths, key=lambda depth: (depths[depth], -depth))
        if len(depths) > 1:
            self._two_depths(next(parts for parts in folders if len(parts) != depth), depth, folders)
        splits = [{parts[level].lower() in SPLIT_OF for parts in folders} for level in range(depth)]
        fits = {"domain": ({False},), "split": ({True},), "class": ({False}, {True, False})}
        for layout in (layout.split("/") for layout in LAYOUTS):
            if len(layout) == depth and all(found in fits[level] for level, found in zip(layout, splits)):
                return layout
        ordered = sorted(folders, key=lambda parts: [part.lower() not in SPLIT_OF for part in parts])
        examples = " or ".join(dict.fromkeys(self._example(parts) for parts in (ordered[0], ordered[-1])))
        raise ValueError(
            f"{examples} in {short(self.root)} does not show what its folders are; images are read from "
            f"{', '.join(LAYOUTS)}, where splits are called train, val or test and no domain is; move the folders, or "
            "write layout=."
        )

    def check_readable(self, is_wanted: Callable[[Parts], bool]) -> None:
        """Raise an `OSError` if a folder that is wanted cannot be read."""
        for parts, reason in self.unreadable.items():
            if is_wanted(parts):
                raise OSError(
                    f"Folder {short('/'.join(parts))} in {short(self.root)} cannot be read ({reason}); allow it, or "
                    "take the folder away."
                )

    def check_depth(self, folders: Iterable[Parts], layout: Sequence[str]) -> None:
        """Raise a `ValueError` if one of the folders, which have images, does not lie as deep as the layout says."""
        wrong = next((parts for parts in folders if len(parts) != len(layout)), None)
        if wrong is not None:
            self._two_depths(wrong, len(layout), {})

    def _two_depths(self, wrong: Parts, depth: int, folders: Iterable[Parts]) -> None:
        other = next((parts for parts in folders if len(parts) == depth), None)
        place = f"others lie {depth} deep" + (f", such as {self._example(other)}" if other else "")
        raise ValueError(
            f"Image {self._example(wrong)} in {short(self.root)} lies {len(wrong)} folders deep, but {place}, so its "
            "class is not known; move it, or take it out of this folder."
        )

    def _example(self, parts: Parts) -> str:
        return short("/".join((*parts, self.images[parts][0])))


def _kind(entry: os.DirEntry) -> str | None:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError:  # a link that leads to itself or to where nobody may look
        return None


def _looks_like_image(name: str) -> bool:
    return (mimetypes.guess_type(name)[0] or "").startswith("image/")

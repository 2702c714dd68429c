"""The folders of images that are read, and what their domains and classes are called."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from .folders import LAYOUTS, SPLIT_OF, ImageTree, Parts, short, spelling


logger = logging.getLogger(__name__)


class ChosenFolders:
    """The folders of a tree whose images are read.

    Args:
        tree: the tree.
        levels: what its levels of folders are, from the first, such as `["domain", "class"]`.
        wanted: the names that are asked for, or `None` for all, by `"domain"` and `"class"`.

    Attributes:
        matches: what `match` returned for domains and for classes.
        folders: the folders with images, in alphabetical order.

    Raises:
        OSError: a folder cannot be read.
        ValueError: as for `match`.
    """

    def __init__(self, tree: ImageTree, levels: Sequence[str], wanted: Mapping[str, Sequence[str] | None]) -> None:
        self.tree, self.levels = tree, levels
        self.source = f"Folder {short(tree.root)}"
        self._keys = {level: None if names is None else set(map(spelling, names)) for level, names in wanted.items()}
        tree.check_readable(self._is_wanted)
        self.matches: dict[str, dict[str, str]] = {}
        for level, names in wanted.items():
            # A folder without images can only be one that is asked for.
            folders = [parts for parts in tree.images if names is not None or self._has_images(parts)]
            self.matches[level] = match(
                {self.name(level, parts) for parts in folders} - {""}, names, self.source, level
            )
        self.folders = sorted(filter(self._has_images, tree.images))

    def name(self, level: str, parts: Parts) -> str:
        """The name of a folder's `"domain"`, `"split"` or `"class"`; `""` if it lies above that level."""
        if level not in self.levels:
            return os.path.basename(os.path.abspath(self.tree.root)) or "images"
        place = self.levels.index(level)
        return parts[place] if place < len(parts) else ""

    def _is_wanted(self, parts: Parts) -> bool:
        """Whether a folder, or one in it, may be asked for."""
        for level, keys in self._keys.items():
            name, deep = self.name(level, parts), len(parts) > len(self.levels)
            # Of a folder that lies too deep, which is an error later, any part may be the name.
            names = {self.name("domain", ()), *parts} - {""} if deep else {name}
            if keys is not None and names != {""} and keys.isdisjoint(map(spelling, names)):
                return False
        return True

    def _has_images(self, parts: Parts) -> bool:
        return bool(self.tree.images[parts]) and self._is_wanted(parts)

    def check(self) -> None:
        """Raise a `ValueError` if images would be lost or are not clear, and warn of what is left out or is merged."""
        tree = self.tree
        if not self.folders:
            raise ValueError(
                f"{self.source} has no images of the form domain/class/image, such as Art/Bed/1.jpg, nor of "
                f"{', '.join(LAYOUTS)}; give the domains' folder."
            )
        tree.check_depth(self.folders, self.levels)
        for parts in self.folders:
            split = self.name("split", parts) if "split" in self.levels else "train"
            if split.lower() not in SPLIT_OF:
                raise ValueError(f"{short(split)} in {short(tree.root)} is no name of a split, such as train or test.")
            _check_unicode(os.path.join(tree.root, *parts), tree.images[parts])
        if tree.links:
            self._check_links()
        for level, matches in self.matches.items():
            names = {self.name(level, parts) for parts in self.folders}
            warn_of_merged({name: matches[name] for name in names}, self.source, level)
        over = [short("/".join(parts)) for parts in tree.passed_over if self._is_wanted(parts[:-1])]
        if over:
            logger.warning(
                "%s has %d files or links that are no images that can be read, such as %s; they are left out.",
                self.source,
                len(over),
                ", ".join(over[:3]),
            )

    def _check_links(self) -> None:
        """Raise a `ValueError` if links lead twice to one image of a domain, which could then train and evaluate."""
        seen: dict[tuple[str, str], str] = {}
        for parts in self.folders:
            domain = self.matches["domain"][self.name("domain", parts)]
            for name in self.tree.images[parts]:
                real, file = os.path.join(self.tree.real[parts], name), "/".join((*parts, name))
                if os.path.islink(real):
                    real = os.path.realpath(real)
                other = seen.setdefault((domain, real), file)
                if other != file:
                    raise ValueError(
                        f"{short(file)} and {short(other)} in {short(self.tree.root)} are one image, by a link; "
                        "remove the link."
                    )


def _check_unicode(folder: str, names: Sequence[str]) -> None:
    for name in ("", *names):
        try:
            f"{folder}/{name}".encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"The name of {short(os.path.join(folder, name)[-90:])} is not valid UTF-8; rename it."
            ) from None


def match(names: Collection[str], wanted: Sequence[str] | None, source: str, kind: str) -> dict[str, str]:
    """For each name the wanted name that it matches: one with the same `spelling`.

    Args:
        names: names of folders, or values of a column.
        wanted: names that are asked for. If it is `None`, names that match each other become the first of them.
        source, kind: where the names come from, and what they are, for errors.

    Raises:
        ValueError: a wanted name is missing, or matches another wanted name.
    """
    counts = Counter(map(spelling, wanted or ()))
    twice = [short(name) for name in wanted or () if counts[spelling(name)] > 1]
    if twice:
        raise ValueError(f"{twice[0]} and {twice[1]} name the same {kind} of {source}; write one of them.")
    targets: dict[str, str] = {}
    for name in sorted(unicodedata.normalize("NFC", name) for name in names) if wanted is None else wanted:
        targets.setdefault(spelling(name), name)
    matches = {name: targets[spelling(name)] for name in names if spelling(name) in targets}
    found = set(matches.values())
    missing = [name for name in wanted or () if name not in found]
    if missing:
        raise ValueError(
            f"{source} lacks {short(missing[0])} and {len(missing) - 1} more of {len(wanted or ())} names; it has "
            f"{', '.join(repr(name[:30])[1:-1] for name in sorted(names)[:6]) or 'none'} and so on. Give the data set "
            "that has them all."
        )
    return matches


def warn_of_merged(matches: Mapping[str, str], source: str, kind: str) -> None:
    """Warn of names that became one; `matches` is what `match` returned."""
    names: dict[str, list[str]] = {}
    for name in sorted(matches):
        names.setdefault(matches[name], []).append(name)
    for target, spellings in names.items():
        if len(spellings) > 1:
            logger.warning("%s: %s are one %s, %s.", source, ", ".join(map(ascii, spellings)), kind, ascii(target))

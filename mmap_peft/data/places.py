"""Which rows of a data set the files of a split are."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from .folders import short


class Places:
    """Finds names in a sequence: in their own spelling or, if there is exactly one such name, in another one.

    Names are the same in another spelling if they differ in case, in `_` for a space, or in the composition of Unicode
    characters. Office-Home's folder says "Real World", its lists say "Real_World".

    Args:
        names: the sequence, such as the column `file`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._exact = _by_name(self.names)

    @cached_property
    def _plain(self) -> dict[str, list[int]]:
        return _by_name(map(_plain, self.names))

    def find(self, name: str) -> int | None:
        """The place of a name, or `None` if there is no such name.

        Raises:
            ValueError: there are several.
        """
        places = self._exact.get(name) or self._plain.get(_plain(name), [])
        if len(places) > 1:
            others = " and ".join(short(self.names[place]) for place in places[:2])
            raise ValueError(f"{short(name)} may be {others}; write the name as in the data, where it must be unique.")
        return places[0] if places else None

    def rows(self, parts: Mapping[str, Sequence[str]], owner: str) -> dict[str, list[int]]:
        """The places of the files in each part of a split.

        Raises:
            ValueError: a file is missing or one of several, or two of them are the same row.
        """
        found = {part: [self.find(file) for file in files] for part, files in parts.items()}
        missing = [file for part, files in parts.items() for file, row in zip(files, found[part]) if row is None]
        if missing:
            raise ValueError(
                f"The split names {short(missing[0])} and {len(missing) - 1} more files of {short(owner)} that the "
                "data lack; give the folder that the lists were made for."
            )
        rows = {part: [row for row in places if row is not None] for part, places in found.items()}
        seen: dict[int, str] = {}
        for part, files in parts.items():
            for file, row in zip(files, rows[part]):
                named = f"{short(file)} in {part}"
                if row in seen:
                    raise ValueError(
                        f"{seen[row]} and {named} of {short(owner)} are one image of the data; name each image once."
                    )
                seen[row] = named
        return rows


def _by_name(names: Iterable[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return places


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).replace(" ", "_").lower()

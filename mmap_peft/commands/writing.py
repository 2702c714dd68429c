"""Files that commands write."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ..multitask.files import PART


@contextmanager
def written(path: str | os.PathLike | None) -> Iterator[TextIO]:
    """A text file that replaces `path` when the `with` block has ended without an error; stdout for `None`."""
    if path is None:
        yield sys.stdout
        return
    part = Path(f"{path}{PART}")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise

"""Values that only the thread and `asyncio` task which set them can read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch


T = TypeVar("T")


class _Thread(threading.local):
    def __init__(self) -> None:
        self.pairs: tuple = ()


class Overrides(Generic[T]):
    """Values of objects inside of `with overrides.set(...)` blocks, for the thread and `asyncio` task that runs the
    block. A model compiled by `torch.compile` reads those of the block that its thread entered last.
    """

    def __init__(self, name: str) -> None:
        self._pairs: ContextVar[tuple[tuple[object, T], ...]] = ContextVar(name, default=())
        self._thread = _Thread()  # torch.compile cannot trace a ContextVar, but it can trace this

    def get(self, owner: object) -> T | None:
        """The value that the innermost block sets for an object; `None` if no block does."""
        pairs = self._thread.pairs if torch.compiler.is_compiling() else self._pairs.get()
        for candidate, value in reversed(pairs):
            if candidate is owner:
                return value
        return None

    @contextmanager
    def set(self, owner: object, value: T) -> Iterator[None]:
        """Inside the `with` block an object has this value."""
        token = self._pairs.set((*self._pairs.get(), (owner, value)))
        self._thread.pairs = self._pairs.get()
        try:
            yield
        finally:
            self._pairs.reset(token)
            self._thread.pairs = self._pairs.get()

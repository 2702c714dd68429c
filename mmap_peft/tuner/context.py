"""A value that belongs to the thread and task which set it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch


T = TypeVar("T")


class _ThreadLocal(threading.local):
    def __init__(self, default: object) -> None:
        self.value = default


class ContextValue(Generic[T]):
    """A value that only the code inside a `with value.set(...)` block sees, in its thread and `asyncio` task.

    Args:
        name (`str`): for debugging.
        default: the value outside of all blocks.
    """

    def __init__(self, name: str, default: T) -> None:
        self._variable: ContextVar[T] = ContextVar(name, default=default)
        self._local = _ThreadLocal(default)  # torch.compile cannot trace a ContextVar, but it can trace this

    def get(self) -> T:
        """The current value."""
        return self._local.value if torch.compiler.is_compiling() else self._variable.get()

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Inside the `with` block this is the value."""
        token, before = self._variable.set(value), self._local.value
        self._local.value = value
        try:
            yield
        finally:
            self._variable.reset(token)
            self._local.value = before

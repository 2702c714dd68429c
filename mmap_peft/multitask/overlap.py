"""One change of shared state for `with` blocks that overlap, in any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager


_lock = threading.Lock()  # of the module, since a lock cannot be copied with its object


class Overlap:
    """The first of the `with` blocks that overlap makes a change, the last one that ends undoes it."""

    def __init__(self) -> None:
        self._blocks = 0  # that have begun and not ended
        self._undo: ExitStack | None = None

    @contextmanager
    def block(self, change: Callable[[ExitStack], None]) -> Iterator[None]:
        """A block; `change` makes the change and registers in the stack what undoes it."""
        with _lock:
            if not self._blocks:
                with ExitStack() as stack:
                    change(stack)
                    self._undo = stack.pop_all()
            self._blocks += 1
        try:
            yield
        finally:
            with _lock:
                self._blocks -= 1
                if not self._blocks:
                    undo, self._undo = self._undo, None
                    undo.close()

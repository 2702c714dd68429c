"""Evaluation mode for a block of code, from several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class EvaluationMode:
    """Puts a module into evaluation mode while at least one thread is inside a `with mode.of(module)` block.

    The last block that ends restores what was in training mode before the first one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._training: list[nn.Module] = []

    @contextmanager
    def of(self, module: nn.Module) -> Iterator[None]:
        """Inside the `with` block no part of the module is in training mode."""
        with self._lock:
            if not self._blocks:
                self._training = [part for part in module.modules() if part.training]
                module.eval()
            self._blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if not self._blocks:
                    for part in self._training:
                        part.training = True
                    self._training = []

    def __reduce__(self) -> tuple:
        return EvaluationMode, ()  # a copy has a lock of its own

"""Detects whether parameters have changed since something was computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from .devices import on_host


SAMPLE = 64  # number of values of a frozen parameter that are compared


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that `torch.autocast` computes in on a device; `None` where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


_by_versions: ContextVar[bool] = ContextVar("mmap_peft_by_versions", default=False)


@contextmanager
def compared_by_versions() -> Iterator[None]:
    """Inside the `with` block, in this thread, fingerprints leave out the values of parameters on a GPU, which cannot
    be compared without waiting for it. What is written through `.data` then goes unnoticed."""
    token = _by_versions.set(True)
    try:
        yield
    finally:
        _by_versions.reset(token)


class Fingerprint:
    """Remembers the values of some parameters. Two fingerprints are equal if nothing has changed in between.

    Version counters do not see what is written through `.data` or numpy, so values are compared, too: all of those of
    adapters, and an evenly spread sample of the frozen base, which is too large to be compared at each use. Of
    `modules`, some of which have no parameters, it is remembered which they are.
    """

    def __init__(
        self,
        frozen: Iterable[torch.Tensor],
        adapters: Iterable[torch.Tensor] = (),
        modules: Iterable[nn.Module] = (),
    ) -> None:
        self._modules, self._marks, values = list(modules), [], {}
        for size, parameters in ((SAMPLE, frozen), (None, adapters)):
            for parameter in parameters:
                data = parameter.detach()
                self._marks.append(
                    (data.data_ptr(), None if data.is_inference() else parameter._version, data.numel())
                )
                if _by_versions.get() and not on_host(data.device):
                    continue
                # Tensors of other classes (quantised ones) cannot be flattened.
                if type(parameter.data) is torch.Tensor and data.numel() and not data.is_meta:
                    step = 1 if size is None else max(1, data.numel() // size)
                    values.setdefault(data.device, []).append(data.reshape(-1)[::step])
        self._values = [torch.cat(parts) for parts in values.values()]  # a copy

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint) or (self._marks, self._modules) != (other._marks, other._modules):
            return False
        return all(map(torch.equal, self._values, other._values))

    __hash__ = None

"""Whether parameters still have the values that something was computed from."""

from __future__ import annotations

from collections.abc import Iterable

import torch


SAMPLE = 64  # values of a frozen parameter that are compared


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that `torch.autocast` computes in on a device, `None` outside of it: part of what results depend on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class Fingerprint:
    """What is remembered of some parameters, to be compared with `==`.

    Version counters do not see what is written through `.data` or numpy, so values are compared: all of those of
    adapters, and an evenly spread sample of those of the frozen base, which is too large to be compared at each use.

    Args:
        frozen (`Iterable[torch.Tensor]`): parameters of the base.
        adapters (`Iterable[torch.Tensor]`): parameters that may train.
    """

    def __init__(self, frozen: Iterable[torch.Tensor], adapters: Iterable[torch.Tensor] = ()) -> None:
        values: dict[torch.device, list[torch.Tensor]] = {}
        marks = []
        for size, parameters in ((SAMPLE, frozen), (None, adapters)):
            for parameter in parameters:
                data = parameter.detach()
                marks.append((data.data_ptr(), None if data.is_inference() else parameter._version, data.numel()))
                # Tensors of other classes (quantised ones) cannot be flattened.
                if type(parameter.data) is torch.Tensor and data.numel() and not data.is_meta:
                    step = 1 if size is None else max(1, data.numel() // size)
                    values.setdefault(data.device, []).append(data.reshape(-1)[::step])
        self._marks = marks
        # Concatenated, and by that copied.
        self._values = [torch.cat(parts) for parts in values.values()]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint) or self._marks != other._marks:
            return False
        return all(torch.equal(one, another) for one, another in zip(self._values, other._values))

    __hash__ = None

"""Small tensors on the device that computes, without waiting for it at each step."""

from __future__ import annotations

import functools
from typing import Any

import torch


def on_host(device: torch.device) -> bool:
    """Whether a device is the CPU, whose values can be read without waiting."""
    return device.type == "cpu"


def is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor is on a device already."""
    return tensor.device == device


def transfer(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on another device. Unless its memory is pinned, the CPU waits for the device."""
    return tensor.to(device)


def on_device(values: Any, device: torch.device) -> torch.Tensor:
    """Values on a device: a tensor on any device, an array, or numbers in nested sequences.

    Those in the memory of the CPU are transferred once and kept for later calls with the same values, so this is for
    few values, such as the numbers of routes. The result must not be changed.
    """
    tensor = torch.as_tensor(values)
    if on_host(device) or is_on(tensor, device) or torch.compiler.is_compiling():
        return tensor.to(device)
    if tensor.device.type != "cpu":
        return transfer(tensor, device)
    return _kept(tensor.contiguous().view(torch.uint8).numpy().tobytes(), tensor.dtype, tuple(tensor.shape), device)


@functools.lru_cache(maxsize=1024)
def _kept(content: bytes, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # A later training step could not use a tensor that was made in inference mode.
    with torch.inference_mode(False):
        empty = torch.empty(shape, dtype=dtype)
        values = torch.frombuffer(bytearray(content), dtype=dtype).view(shape) if content else empty
        return transfer(values, device)

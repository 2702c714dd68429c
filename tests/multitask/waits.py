"""Finds what would make a training step wait for a GPU, on a machine without one.

Every tensor here is in the memory of the CPU. A `Watch` notes the memory of those that would be on the GPU: the model,
batches, what is transferred, and what is computed of these. It raises an error where a step reads values of them, does
something whose result has a size that depends on values, or uses a tensor of the host together with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


# Operations that read values, or whose result has a size that depends on values.
READS = (
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_static", "masked_select"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "histc"),
    *("repeat_interleave", "_linalg_eigh", "_linalg_svd", "_linalg_solve_ex", "linalg_lstsq"),
)
METHODS = ("cpu", "numpy", "tolist", "__array__")  # of tensors; they read values without an operation
MADE = ("arange", "zeros", "ones", "full", "empty", "eye", "rand", "randn", "randint", "randperm", "linspace")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class Wait(AssertionError):
    """A step would wait for the GPU."""


class Watch(TorchDispatchMode):
    """Notes what would be on the GPU; `on` says whether waiting is an error now."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.seen = False, 0  # operations on the GPU while it was on
        self._device: dict[int, Any] = {}  # by address; the memory is kept, so that no other gets its address
        self._made: dict[int, Any] = {}  # made on a device that was named: it goes with either

    def put(self, *parts: Any) -> None:
        """Note that tensors are on the GPU."""
        for tensor in _tensors(parts):
            storage = tensor.untyped_storage()
            self._device[storage._cdata] = storage

    def made(self, tensor: torch.Tensor, anywhere: bool = True) -> None:
        storage = tensor.untyped_storage()
        if anywhere:
            self._made[storage._cdata] = storage
        else:
            self._made.pop(storage._cdata, None)

    def has(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata in self._device

    def is_on(self, tensor: torch.Tensor, device: torch.device) -> bool:
        return not self._is_host(tensor)

    def _is_host(self, tensor: torch.Tensor) -> bool:
        return not self.has(tensor) and tensor.untyped_storage()._cdata not in self._made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(_tensors(args)) + list(_tensors(kwargs or {}))
        name, on_gpu = func.name().partition("::")[2].partition(".")[0], any(map(self.has, given))
        if on_gpu and self.on:
            self.seen += 1
            indices = _tensors(args[1]) if name in ("index", "index_put", "index_put_") else []
            if name in READS or any(each.dtype == torch.bool for each in indices):
                raise Wait(f"{func} waits for the GPU")
            hosts = [each for each in given if self._is_host(each) and each.dim()]
            if hosts:  # a number, with no dimension, is handed to the GPU with the operation
                raise Wait(f"{func} of the GPU uses {[tuple(each.shape) for each in hosts]} of the CPU")
        result = func(*args, **(kwargs or {}))
        anywhere = not any(map(self._is_host, given))
        for each in _tensors(result):
            if on_gpu:
                self.put(each)
            elif anywhere:
                self.made(each)
        return result


class Calls(TorchFunctionMode):
    """Sees calls of which a `Watch` sees no operation."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.watch.on and name in METHODS and args and self.watch.has(args[0]):
            raise Wait(f"Tensor.{name} waits for the GPU")
        result = func(*args, **kwargs)
        if name in MADE and kwargs.get("device") is None:
            self.watch.made(result, False)
        return result


@contextlib.contextmanager
def watched(monkeypatch: Any) -> Iterator[Watch]:
    """Inside the `with` block the library takes the CPU for a GPU."""
    from mmap_peft.tuner import devices

    watch = Watch()

    def transfer(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if watch.on:
            raise Wait(f"A tensor {tuple(tensor.shape)} is transferred")
        copy = tensor.clone()
        watch.put(copy)
        return copy

    devices._kept.cache_clear()
    with monkeypatch.context() as patch, watch, Calls(watch):
        for module in MODULES:
            for name, value in (("on_host", lambda _: False), ("is_on", watch.is_on), ("transfer", transfer)):
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        yield watch
    devices._kept.cache_clear()


def _modules() -> list[Any]:
    from mmap_peft.multitask import pictures, task_texts, text_features
    from mmap_peft.tuner import assemble, devices, fingerprint, texts

    return [pictures, task_texts, text_features, assemble, devices, fingerprint, texts]


MODULES = _modules()

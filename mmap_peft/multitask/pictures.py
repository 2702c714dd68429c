"""Images as bytes, which are transferred to the device in one piece and normalized there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..tuner.assemble import take_rows
from ..tuner.devices import on_device
from .augmentation import apply
from .images import TaskImages


Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]

_NUMBERS = ("labels", "task_ids")  # of 8 bytes each, before the pixels in a row of bytes


@dataclass(frozen=True)
class OnHost:
    """What of a batch stays in the memory of the CPU. It holds no tensors, so that nothing transfers it.

    Attributes:
        shape: of a picture, (3, height, width).
        size: height and width of the model's input.
        table: (3, 256), what the image processor makes of each byte of each channel.
        task_counts: number of images of each task; `None` if a collator of the user's may have changed it.
        changes: (images, 10), what `Augmentation.draw` returned; `None` without augmentation.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    table: np.ndarray
    task_counts: list[int] | None
    changes: np.ndarray | None


class Pictures(Dataset):
    """The images of a `TaskImages` before they are normalized.

    An item is `{"labels": ..., "task_ids": ..., "pictures": (3, H, W) of uint8, "changes": what was drawn or None}`.
    `model_inputs` makes the model's inputs of what `collate` returns.

    Args:
        images (`TaskImages`): the images, whose cache is used; `images.preprocessing` must run in two steps.
    """

    def __init__(self, images: TaskImages) -> None:
        self.images, self.sizes, self.shape = images, images.sizes, images.preprocessing.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.images.as_bytes(row), "changes": None}

    def collate(self, items: Sequence[dict[str, Any]], collate: Collate | None = None) -> dict[str, Any]:
        """A batch of items: `{"packed": (images, bytes), "host": OnHost}`, where a row holds label, task and pixels of
        an image. With `collate`, what that makes of the items with their pictures as tensors, and `"host"`."""
        preprocessing, drawn = self.images.preprocessing, [item["changes"] for item in items]
        changes = None if drawn[0] is None else np.stack(drawn)
        counts = np.bincount([item["task_ids"] for item in items], minlength=len(self.sizes)).tolist()
        host = OnHost(self.shape, preprocessing.shape[1:], preprocessing.table, counts, changes)
        if collate is None:
            return {"packed": self._packed(items), "host": host}
        tensors = [
            {**{name: item[name] for name in _NUMBERS}, "pictures": torch.from_numpy(item["pictures"].copy())}
            for item in items
        ]
        return {**collate(tensors), "host": replace(host, task_counts=None)}

    def _packed(self, items: Sequence[dict[str, Any]]) -> torch.Tensor:
        head, size = 8 * len(_NUMBERS), int(np.prod(self.shape))
        rows = torch.zeros(len(items), head + -(-size // 8) * 8, dtype=torch.uint8)  # so that numbers start at 8 bytes
        for row, item in zip(rows.numpy(), items):
            row[:head].view(np.int64)[:] = [item[name] for name in _NUMBERS]
            row[head : head + size] = item["pictures"].reshape(-1)
        return rows


def model_inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The inputs of the model on a device: of a batch of `Pictures.collate` with `pixel_values`, as the image
    processor normalizes each byte of the changed pictures; any other batch as it is."""
    if "host" not in batch:
        return batch
    host = batch["host"]
    rest = {name: value for name, value in batch.items() if name not in ("host", "packed", "pictures")}
    if "packed" in batch:
        packed = batch["packed"].to(device, non_blocking=True)
        head, size = 8 * len(_NUMBERS), int(np.prod(host.shape))
        rest |= zip(_NUMBERS, packed[:, :head].view(torch.int64).t().contiguous())
        pictures = packed[:, head : head + size].unflatten(1, host.shape)
    else:
        pictures = batch["pictures"].to(device)
    if host.changes is not None:
        pictures = apply(host.changes, pictures, host.size)
    return {"pixel_values": normalized(pictures, host.table), **rest, "task_counts": host.task_counts}


def normalized(pictures: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    """What the image processor makes of bytes, (images, 3, height, width), by its `Preprocessing.table`."""
    channels = zip(on_device(table, pictures.device), pictures.unbind(1))
    return torch.stack([take_rows(values, part.int().flatten()).view(part.shape) for values, part in channels], dim=1)

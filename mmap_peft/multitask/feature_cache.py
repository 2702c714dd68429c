"""Features of images that are computed once: what enters the first layer of the image tower that adapters change."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset

from ..tuner.fingerprint import autocast_dtype
from ..tuner.images import constant_parameters, image_states
from .base_record import QUANTISED, processor_settings, weights_digest
from .decoding import decode, is_stored
from .images import TaskImages
from .pictures import Pictures
from .replacing import sha256
from .row_files import KEY_BYTES, RowFiles
from .training_pictures import TrainingPictures


FORMAT = 1  # changes with what a key or a row holds


@dataclass
class FeatureCache:
    """The states that enter one layer, by the key of an image, in `RowFiles`.

    Args:
        name (`str`): the `features_name`.
        layer (`int`): number of the layer, as for `ImageStates`.
        files (`RowFiles`): the files.
        shape (`tuple[int, ...]`): of the states of one image.
        dtype, stored (`torch.dtype`): dtype of the states, and of what the files hold. If it is another one, states
            that were just computed are rounded, too, so that it makes no difference which images the files hold.
    """

    name: str
    layer: int
    files: RowFiles
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype

    def get(self, key: bytes) -> torch.Tensor | None:
        """The states of an image on the CPU, or `None`."""
        states = torch.empty(self.shape, dtype=self.stored)
        return states.to(self.dtype) if self.files.get(key, _bytes(states)) else None

    @torch.no_grad()
    def compute(self, clip: nn.Module, pixels: torch.Tensor, keys: Sequence[bytes | None], batch: int) -> torch.Tensor:
        """Compute the states of images, and keep those that have a key.

        Matrix products of one row of tokens may differ in their last bits from those of several, which are all the
        same. So one image of a `batch` of several is computed twice.
        """
        count = len(pixels)
        states = image_states(clip, torch.cat([pixels] * 2) if count == 1 < batch else pixels, self.layer)[:count]
        stored = states.to(self.stored)
        for key, row in zip(keys, stored.cpu().contiguous()):
            if key is not None:
                self.files.put(key, _bytes(row))
        return stored.to(self.dtype)


def _bytes(states: torch.Tensor) -> memoryview:
    return memoryview(states.reshape(-1).view(torch.uint8).numpy())


def features_name(
    clip: nn.Module, image_processor: Any, layer: int, device: torch.device, stored: torch.dtype
) -> str | None:
    """A name for all that the states of an image depend on but the image; `None` if some of it cannot be told."""
    tower, processor = clip.vision_model, processor_settings(image_processor)
    weights = weights_digest(clip, constant_parameters(clip, layer))
    if processor is None or weights in (None, QUANTISED):
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    settings = {
        "format": FORMAT,
        "versions": [torch.__version__, transformers.__version__, PIL.__version__],
        "tower": [type(tower).__name__, tower.config.to_dict(), tower.config._attn_implementation],
        "processor": [type(image_processor).__name__, processor],
        "weights": weights,
        "dtypes": [clip.dtype, autocast_dtype(device), stored, torch.get_float32_matmul_precision()],
        "device": [device.type, name, torch.get_num_threads()],
        "layer": layer,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:32]


class CachedImages(Dataset):
    """Images of which those that a `FeatureCache` holds are neither read nor decoded.

    An item is `{"labels": ..., "task_ids": ..., "states": what the cache holds}`, or else that of the images, with its
    `"key"`; the key is `None` for an image that cannot be read or may be another one at the next visit.

    Args:
        images (`TaskImages` or `Pictures`): the images. Augmented ones must have a fixed number of views.
        cache (`FeatureCache`): the cache.
    """

    def __init__(self, images: TaskImages | Pictures, cache: FeatureCache) -> None:
        self.images, self.cache, self.sizes = images, cache, images.sizes
        self._plain = images.images if isinstance(images, Pictures) else images
        self._digests: dict[int, bytes] = {}  # of pictures that stay the same, by their row

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Any) -> dict[str, Any]:
        row = place[0] if isinstance(self.images, TrainingPictures) else place
        key = self._key(int(row), place)
        states = None if key is None else self.cache.get(key)
        if states is None:
            return {**self.images[place], "key": key}
        task_id, number = self._plain.task_and_number(row)
        return {"labels": int(self._plain.data[task_id].labels[number]), "task_ids": task_id, "states": states}

    def _key(self, row: int, place: Any) -> bytes | None:
        task_id, number = self._plain.task_and_number(row)
        rows = self._plain.data[task_id]
        if not rows.stored:
            return None
        digest = self._digests.get(row)
        if digest is None:
            try:
                picture = rows[number][0]
                digest = picture_digest(picture)
            except Exception:  # it is reported when it is read
                return None
            if is_stored(picture):
                self._digests[row] = digest
        view = self.images.view(place) if isinstance(self.images, TrainingPictures) else ""
        return hashlib.sha256(digest + view.encode()).digest()[:KEY_BYTES]


def picture_digest(picture: Any) -> bytes:
    """SHA-256 of a picture: of the content of a file, or of the pixels of one in memory.

    Raises:
        ValueError: it is no picture, or can be read only once.
        OSError: its file cannot be read.
    """
    if isinstance(picture, Mapping):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, str | os.PathLike):
        path = os.fspath(picture)
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise ValueError(f"{path} is no file")
        return bytes.fromhex(sha256(path))
    if isinstance(picture, bytes | bytearray):
        return hashlib.sha256(picture).digest()
    if hasattr(picture, "read"):
        raise ValueError("an open file can be read only once")
    image = decode(picture)
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()


def collate_features(items: Sequence[dict[str, Any]], name: str, collate: Any) -> dict[str, Any]:
    """A batch of items of `CachedImages`, of the cache with this name: labels and tasks of all images, the states of
    those that are `known`, and as `"missing"` what `collate` makes of the others. Keys are no tensors, so that they
    stay in the memory of the CPU."""
    known = [number for number, item in enumerate(items) if "states" in item]
    missing = [dict(item) for item in items if "states" not in item]
    keys = [item.pop("key") for item in missing]
    batch = {each: torch.tensor([int(item[each]) for item in items]) for each in ("labels", "task_ids")}
    counts = np.bincount(batch["task_ids"]).tolist()
    batch |= {"name": name, "known": known, "keys": keys, "task_counts": counts}
    if known:
        batch["states"] = torch.stack([items[number]["states"] for number in known])
    if missing:
        batch["missing"] = collate(missing)
    return batch

"""Features of texts, and a cache for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..tuner.assemble import Prompts
from ..tuner.devices import on_device, transfer
from ..tuner.fingerprint import Fingerprint
from ..tuner.texts import can_share, shared_text_features
from ..tuner.tower import with_ends
from .class_texts import TextBatch


def encode_texts(
    clip: nn.Module,
    batch: TextBatch,
    prompts_of: Callable[[slice], Prompts | None],
    device: torch.device,
    chunk: int | None = None,
    share: bool = True,
) -> torch.Tensor:
    """Unit text features of all classes in a batch, (classes of all tasks, dim); the mean for a class with several
    texts. `prompts_of` returns the prompts of some rows of the batch, `device` is the text tower's device, at most
    `chunk` texts are encoded at a time, and `share` allows `shared_text_features`.

    With several chunks, the backward pass encodes each again, so that the activations of one are in memory at a time.
    """
    count, learning = batch.ids.shape[0], torch.is_grad_enabled()
    size = -(-count // -(-count // (chunk or count)))  # of equally large chunks
    chunks = []
    for start in range(0, count, size):
        rows = slice(start, start + size)
        run = functools.partial(_encode_rows, clip, batch, rows, prompts_of(rows), device, share)
        chunks.append(checkpoint(run, use_reentrant=False) if learning and size < count else run())
    features = F.normalize(torch.cat(chunks), dim=-1)
    if max(batch.counts) > 1:
        means = [part.mean(dim=0) for part in features.split(batch.counts)]
        features = F.normalize(torch.stack(means), dim=-1)
    return features


def _encode_rows(
    clip: nn.Module, batch: TextBatch, rows: slice, prompts: Prompts | None, device: torch.device, share: bool
) -> torch.Tensor:
    constants, compiling = batch.constants.setdefault((rows.start, rows.stop), {}), torch.compiler.is_compiling()
    ids = batch.ids[rows]
    ids, prompts = (ids.to(device), prompts) if compiling else _kept_texts(clip, ids, prompts, device, constants)
    if share and can_share(clip, prompts) and not compiling:
        return shared_text_features(clip, ids, prompts, constants)
    return clip.get_text_features(ids, **({} if prompts is None else {"prompts": prompts})).pooler_output


def _kept_texts(
    clip: nn.Module, ids: torch.Tensor, prompts: Prompts | None, device: torch.device, constants: dict[Hashable, Any]
) -> tuple[torch.Tensor, Prompts | None]:
    """Texts on the device, and prompts with the ends of the texts. What depends on texts alone stays in `constants`:
    it is transferred and checked once."""
    tower = getattr(clip, "text_model", None)
    with torch.inference_mode(False):  # a later training step could not use what is made in inference mode
        if ("ids", device) not in constants:
            constants["ids", device] = transfer(ids, device)
        if prompts is not None and prompts.stays_in_sequence and tower is not None:
            key = "ends", device, prompts.length("text")
            if key not in constants:
                constants[key] = on_device(with_ends(prompts, ids, tower).text_ends, device)
            prompts = replace(prompts, text_ends=constants[key])
    return constants["ids", device], prompts


class TextFeatureCache:
    """Keeps text features by a key, as long as the parameters that they depend on do not change.

    Its content is replaced as a whole, so several threads may use it.

    Args:
        largest (`int`, *optional*): number of elements of all features together. Those that were not used for the
            longest time are removed. `None`: no limit.
    """

    def __init__(self, largest: int | None = None) -> None:
        self.largest = largest
        self.clear()

    def clear(self) -> None:
        """Remove all features."""
        self._kept: tuple[Fingerprint | None, dict[Hashable, torch.Tensor]] = None, {}

    def __call__(
        self,
        keys: dict[str, Hashable],
        fingerprint: Fingerprint,
        encode: Callable[[list[str]], Sequence[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """The features of tasks, given the key of each task by its name. `fingerprint` is that of the parameters that
        features depend on; `encode` computes the features of tasks (by name) that are not in the cache."""
        before, features = self._kept
        if before != fingerprint:
            features = {}
        missing = [name for name, key in keys.items() if key not in features]
        if missing:
            # A later training step could not use tensors that were made in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                encoded = {keys[name]: part for name, part in zip(missing, encode(missing))}
            features = {**features, **encoded}
        found = [features[key] for key in keys.values()]
        if self.largest is not None:
            features = self._limited(features, set(keys.values()))
        if missing or self.largest is not None:
            self._kept = fingerprint, features
        return found

    def _limited(self, features: dict[Hashable, torch.Tensor], used: set[Hashable]) -> dict[Hashable, torch.Tensor]:
        """The features in the order of their last use, without the first ones if there are too many."""
        ordered = sorted(features.items(), key=lambda item: item[0] in used)  # stable
        size = sum(part.numel() for _, part in ordered)
        while size > self.largest:
            size -= ordered.pop(0)[1].numel()
        return dict(ordered)

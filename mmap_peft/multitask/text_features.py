"""Features of texts, and a memory for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..tuner.routing import Route, use_routes
from ..tuner.texts import can_share, shared_text_features
from .texts import TextBatch


def encode(
    clip: nn.Module, batch: TextBatch, routes: Sequence[Route] | None, chunk: int | None = None, share: bool = True
) -> torch.Tensor:
    """Unit features of the classes of a batch's texts; that of several texts is their mean.

    Args:
        clip (`nn.Module`): encodes them.
        batch (`TextBatch`): the texts.
        routes (`Sequence[Route]`, *optional*): of each task of the batch; `None` if the method is none of prompts.
        chunk (`int`, *optional*): so many texts at a time.
        share (`bool`): whether words that texts begin with may run once.

    Returns:
        (classes of all tasks, dim).
    """
    size, learning = chunk or len(batch.ids), torch.is_grad_enabled()
    chunks = []
    for start in range(0, len(batch.ids), size):
        run = functools.partial(_encode_rows, clip, batch, routes, slice(start, start + size), share)
        chunks.append(checkpoint(run, use_reentrant=False) if learning and size < len(batch.ids) else run())
    features = F.normalize(torch.cat(chunks), dim=-1)
    if max(batch.counts) > 1:
        means = [part.mean(dim=0) for part in features.split(batch.counts)]
        features = F.normalize(torch.stack(means), dim=-1)
    return features


def _encode_rows(
    clip: nn.Module, batch: TextBatch, routes: Sequence[Route] | None, rows: slice, share: bool
) -> torch.Tensor:
    ids = batch.ids[rows].to(clip.device)
    routed = nullcontext()
    if routes is not None:
        routed = use_routes(clip, routes, text=batch.tasks[rows], classes=batch.classes[rows], pooled=True)
    with routed:
        if share and can_share(clip) and not torch.compiler.is_compiling():
            return shared_text_features(clip, ids, batch.constants.setdefault((rows.start, rows.stop), {}))
        return clip.get_text_features(ids).pooler_output


class TextMemory:
    """Features by a key that tells of what they are, kept while no parameter changes."""

    def __init__(self) -> None:
        self._features: dict[Hashable, torch.Tensor] = {}
        self._state: tuple | None = None

    def clear(self) -> None:
        """Forget all."""
        self._features.clear()

    def __call__(
        self,
        keys: dict[str, Hashable],
        parameters: Iterable[nn.Parameter],
        encode: Callable[[list[str]], Sequence[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """The features of some tasks.

        Args:
            keys: a key for each task's name.
            parameters: what features depend on.
            encode: makes, without gradients, the features of the tasks of which there are none.
        """
        # Changed in place or replaced, a parameter shows it here.
        state = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
        if state != self._state:
            self.clear()
            self._state = state
        missing = [name for name, key in keys.items() if key not in self._features]
        if missing:
            with torch.no_grad():
                found = zip(missing, encode(missing))
            self._features.update({keys[name]: features for name, features in found})
        return [self._features[key] for key in keys.values()]

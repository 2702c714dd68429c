"""Features of many texts that begin with the same words."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .assemble import Prompts, take_rows
from .attention import SUPPORTED, PackedStates, PromptStates
from .devices import on_device, on_host
from .fingerprint import Fingerprint, autocast_dtype
from .layer import first_states, key_and_value, passes_keywords, replaced
from .tower import text_ends


def can_share(clip: nn.Module, prompts: Prompts | None) -> bool:
    """Whether `shared_text_features` can be used: the text tower is causal and its attention takes keys and values;
    prompts are keys and values, too, or replace words that all texts of a route begin with; no layer is checkpointed.
    """
    tower = getattr(clip, "text_model", None)
    if tower is None or prompts is None or prompts.as_tokens or not prompts.length("text"):
        return False
    if prompts.stays_in_sequence:
        first = prompts.layers.get(("text", 0))
        if first is None or first.per_row or prompts.position != "end":
            return False
    if tower.training and any(getattr(layer, "gradient_checkpointing", False) for layer in tower.encoder.layers):
        return False
    # All families whose attention takes keys and values have causal text towers.
    return passes_keywords(tower) and tower.config._attn_implementation in SUPPORTED


def shared_text_features(
    clip: nn.Module, ids: torch.Tensor, prompts: Prompts, constants: dict[Hashable, Any] | None = None
) -> torch.Tensor:
    """The same as `clip.get_text_features(ids, prompts=prompts).pooler_output`, but faster.

    In a causal tower, the words that all texts of a route begin with have the same hidden states in each text. They
    are computed once for each route, and the rest of each text attends to their keys and values. Except in attention,
    all tokens are packed into one row without padding. The last layer computes only the end of each text. The input of
    the first prompted layer is kept from call to call.

    Args:
        clip (`nn.Module`): a model for which `can_share` is true.
        ids (`torch.Tensor`): (texts, tokens), padded after the end.
        prompts (`Prompts`): the prompts, with the route of each text.
        constants (`dict`, *optional*): keeps what does not depend on the prompts. Pass the same dict in each call with
            the same ids, as long as the same rows share a route.

    Returns:
        (texts, dim).
    """
    tower, layers = clip.text_model, clip.text_model.encoder.layers
    constants = {} if constants is None else constants
    pack = constants.get(ids.device)
    if pack is None:
        rows = prompts.rows.get("text")
        rows = ids.new_zeros(ids.shape[0]) if rows is None else on_device(rows, ids.device)
        pack = constants[ids.device] = _TextPack(ids, rows, prompts.routes, text_ends(ids, tower))
    if prompts.stays_in_sequence and prompts.length("text") >= pack.shared:
        return clip.get_text_features(ids, prompts=prompts).pooler_output
    start = prompts.first_layer("text")
    hidden = _constant_part(tower, pack, prompts, start, constants)
    pooled = pack.unpacked_ends(_run(tower, pack, prompts, range(start, len(layers)), hidden))
    return clip.text_projection(tower.final_layer_norm(pooled))


def _run(tower: nn.Module, pack: _TextPack, prompts: Prompts, numbers: range, hidden: torch.Tensor) -> torch.Tensor:
    """Packed texts through some layers of the tower."""
    layers = tower.encoder.layers
    for index in numbers:
        layer, here, states = layers[index], prompts.layers.get(("text", index)), None
        if here is not None and prompts.stays_in_sequence:
            hidden = pack.with_words(tower, hidden, index, prompts)
        elif here is not None:
            key, value = key_and_value(layer, here.states.to(hidden))
            states = PromptStates(key, value, None if here.real is None else here.real.to(key.device))
        packed = pack.joined_by(states)
        if index == len(layers) - 1:
            hidden, packed = pack.ends_alone(layer, hidden, packed)
        hidden = layer(hidden, None, is_causal=True, prompt_states=packed)
    return hidden


def _constant_part(
    tower: nn.Module, pack: _TextPack, prompts: Prompts, start: int, constants: dict[Hashable, Any]
) -> torch.Tensor:
    """What enters layer `start`, the first that gets prompts; kept in `constants` if it is the same at every step."""

    def run() -> torch.Tensor:
        return _run(tower, pack, prompts, range(start), pack.embedded(tower))

    if not start:
        return run()
    random = tower.training and tower.config.attention_dropout > 0
    learning = any(parameter.requires_grad for parameter in tower.parameters())
    if random or learning or any(isinstance(module, BaseTunerLayer) for module in tower.modules()):
        return run()
    kept: tuple | None = constants.get("hidden")
    state = start, autocast_dtype(pack.device), Fingerprint(tower.parameters(), modules=tower.modules())
    if kept is None or kept[0] != state:
        # A later training step could not use a tensor that was made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            kept = constants["hidden"] = state, run()
    return kept[1]


class _TextPack:
    """Texts as one row of tokens: for each route the words that all its texts begin with, then the rest of each text,
    sorted by length. `rows` are the route of each text, `ends` the place of its end.
    """

    def __init__(self, ids: torch.Tensor, rows: torch.Tensor, routes: int, ends: torch.Tensor) -> None:
        self.device = ids.device
        first = torch.stack([(rows == route).int().argmax() for route in range(routes)])
        equal = (ids == ids[first][rows]).all(dim=0).int().cumprod(dim=0)
        self.shared = shared = int(min(equal.sum(), ends.min()))  # at least the start
        self.order = _equally_long(ends)
        self.rows = [None if routes == 1 else rows[part] for part in self.order]
        self.ends = [ends[part] - shared for part in self.order]
        lengths = [shared + int(last.max()) + 1 for last in self.ends]
        self.words = [(ids[first, :shared], 0)]
        self.words += [(ids[part, shared:length], shared) for part, length in zip(self.order, lengths)]
        self.sizes = [tuple(ids.shape) for ids, _ in self.words]

    def embedded(self, tower: nn.Module) -> torch.Tensor:
        """What enters the first layer: (1, tokens, width)."""
        parts = []
        for ids, start in self.words:
            places = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
            parts.append(tower.embeddings(input_ids=ids, position_ids=places).flatten(0, 1))
        return torch.cat(parts)[None]

    def with_words(self, tower: nn.Module, hidden: torch.Tensor, index: int, prompts: Prompts) -> torch.Tensor:
        """The row with the prompts of a layer in the places of the shared words after the first."""
        here = prompts.layers["text", index]
        states = here.states.to(hidden)
        states = first_states(tower, "text", states) if index == 0 else states
        tokens = math.prod(self.sizes[0])
        words = replaced(hidden[0, :tokens].unflatten(0, self.sizes[0]), states, here.real)
        return torch.cat([words.flatten(0, 1), hidden[0, tokens:]])[None]

    def joined_by(self, prompts: PromptStates | None) -> PackedStates:
        """Shared words attend to the prompts of their route, the rest of a text to both; `prompts`: (routes, ...)."""

        def joining(keys: list[torch.Tensor], values: list[torch.Tensor]) -> list[PromptStates]:
            empty = PromptStates(keys[0][:, :0], values[0][:, :0], None)
            of_routes = empty if prompts is None else prompts
            before = of_routes.joined(PromptStates(keys[0], values[0], None))
            return [of_routes, *(self._of_texts(before, number) for number in range(len(self.order)))]

        return PackedStates(self.sizes, joining)

    def ends_alone(
        self, layer: nn.Module, hidden: torch.Tensor, states: PackedStates
    ) -> tuple[torch.Tensor, PackedStates]:
        """The ends of what enters the last layer, (1, texts, width), and the other tokens as keys and values."""
        keys, values = (states.parts(part) for part in key_and_value(layer, hidden))
        rests, joining = states.parts(hidden)[1:], states.joining(keys, values)[1:]
        ends, before = [], []
        for rest, key, value, joined, end in zip(rests, keys[1:], values[1:], joining, self.ends):
            others = torch.arange(rest.shape[1], device=end.device) < end[:, None]
            before.append(joined.joined(PromptStates(key, value, others)))
            ends.append(rest.take_along_dim(end[:, None, None], dim=1))
        return torch.cat(ends).transpose(0, 1), PackedStates([(len(end), 1) for end in ends], lambda *_: before)

    def unpacked_ends(self, ends: torch.Tensor) -> torch.Tensor:
        """The ends in the order of the texts: (texts, width)."""
        return take_rows(ends[0], torch.cat(self.order).argsort())

    def _of_texts(self, states: PromptStates, number: int) -> PromptStates:
        """Expand states of routes, (routes, ...), to the texts of one length, (texts, ...), which follow them."""
        rows, count = self.rows[number], len(self.order[number])
        key, value, valid = (
            None if part is None else part.expand(count, *part.shape[1:]) if rows is None else take_rows(part, rows)
            for part in states[:3]
        )
        return PromptStates(key, value, valid, before_all=True)


def _equally_long(ends: torch.Tensor) -> list[torch.Tensor]:
    """Numbers of the texts of each length; on a GPU, of all texts: padding costs less there than small batches."""
    if not on_host(ends.device):
        return [torch.arange(ends.shape[0], device=ends.device)]
    return [(ends == end).nonzero()[:, 0] for end in ends.unique()]

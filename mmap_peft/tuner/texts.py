"""Features of many texts that begin with the same words."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention import SUPPORTED, PackedStates, PromptStates
from .inputs import text_ends
from .layer import key_and_value, replaced
from .routing import PromptContainer, RoutedPrompts, Routing, spread, take_rows, use_routes


def can_share(clip: nn.Module) -> bool:
    """Whether `shared_text_features` holds for a model: its text tower is causal, its prompts stand beside the tokens
    or before all words that differ, its attention can be handed keys and values, no layer is told to be plain, and
    nothing is checkpointed or switched off."""
    container, tower = getattr(clip, "mmap", None), getattr(clip, "text_model", None)
    routing = None if container is None else container.current
    if tower is None or routing is None or not routing.index.shape[1]:
        return False
    if container.rides(routing) and not _ride_before_the_names(container, routing):
        return False
    if any(layer.forward.plain for layer in tower.encoder.layers):
        return False
    checkpointed = tower.training and any(
        getattr(layer, "gradient_checkpointing", False) for layer in tower.encoder.layers
    )
    causal = tower.config.model_type.removesuffix("_text_model") in ("clip", "metaclip_2", "clipseg")
    return causal and not checkpointed and tower.config._attn_implementation in SUPPORTED


def _ride_before_the_names(container: PromptContainer, routing: Routing) -> bool:
    if container.first_prompted("text", routing, 1) or container.position != "end":
        return False
    made = [generator.prompts("text", 0) for generator in container.generators(routing)]
    return all(prompts is not None and prompts.dim() == 2 for prompts in made)  # three: one context a class


def shared_text_features(
    clip: nn.Module, ids: torch.Tensor, constants: dict[Hashable, Any] | None = None
) -> torch.Tensor:
    """What `clip.get_text_features(ids).pooler_output` is, for less.

    A causal tower gives the words that all texts of a route begin with the same states in each of them: they run once
    a route, and are keys and values for the rest, beside the prompts. All tokens stand in one row, without padding,
    but for attention. In the last layer only the end of a text is computed, since nothing else is used. Layers before
    the first prompted one can be left out after the first time.

    Args:
        clip (`nn.Module`): a model that `can_share`, inside `use_routes`.
        ids (`torch.Tensor`): (texts, tokens), padded behind the end.
        constants (`dict`, *optional*): kept by the caller from call to call as long as ids, and which rows are of one
            route, are the same: what does not depend on the prompts.

    Returns:
        (texts, dim).
    """
    tower, container, layers = clip.text_model, clip.mmap, list(clip.text_model.encoder.layers)
    constants = {} if constants is None else constants
    routing: Routing = container.current
    routes, pack = len(routing.index), constants.get(ids.device)
    if pack is None:
        rows = routing.rows.get("text")
        rows = ids.new_zeros(len(ids)) if rows is None else rows.to(ids.device)
        pack = constants[ids.device] = _TextPack(ids, rows, routes, text_ends(ids, tower.config.eos_token_id))
    routing = replace(routing, rows={"text": torch.arange(routes, device=ids.device)})
    rides = container.rides(routing)

    def run(numbers: range, hidden: torch.Tensor) -> torch.Tensor:
        for index in numbers:
            layer = layers[index]
            routed = container.routed(routing, "text", index, hidden.expand(routes, -1, -1))
            if rides and routed is not None:
                if not index:
                    places = tower.embeddings.position_embedding.weight[1 : routed.prompts.shape[1] + 1]
                    routed = routed._replace(prompts=routed.prompts + places)
                hidden, routed = pack.with_words(hidden, routed), None
            prompts = None if routed is None else PromptStates(*key_and_value(layer, routed.prompts), routed.valid)
            states = pack.joined_by(prompts)
            if layer is layers[-1]:
                hidden, states = pack.ends_alone(layer, hidden, states)
            with layer.self_attn.config.joined_by(states):
                hidden = type(layer).forward(layer, hidden, None, is_causal=True)
        return hidden

    def begin(until: int) -> torch.Tensor:
        with use_routes(clip, ()):  # or prompts that ride on would come in with each part of the texts
            hidden = pack.embedded(tower)
        return run(range(until), hidden)

    if rides:
        entering = container.routed(routing, "text", 0, tower.embeddings.token_embedding.weight.expand(routes, -1, -1))
        if entering.valid is not None or entering.prompts.shape[1] >= pack.shared:
            return clip.get_text_features(ids).pooler_output
    start = container.first_prompted("text", routing, len(layers))
    if not _constant(tower):
        hidden = begin(start)
    else:
        version = tuple((parameter.data_ptr(), parameter._version) for parameter in tower.parameters())
        now = start, version, torch.is_autocast_enabled(ids.device.type)
        if constants.get("of") != now:
            with torch.no_grad():
                constants.update(of=now, hidden=begin(start))
        hidden = constants["hidden"]
    pooled = pack.unpacked_ends(run(range(start, len(layers)), hidden))
    return clip.text_projection(tower.final_layer_norm(pooled))


class _TextPack:
    """Texts as one row of tokens: for each route the words that all its texts begin with, then the rest of each text.
    Those of one length stand together.

    Args:
        ids (`torch.Tensor`): (texts, tokens), padded behind the end.
        rows (`torch.Tensor`): (texts,), which route a text has.
        routes (`int`): how many there are.
        ends (`torch.Tensor`): (texts,), place of each text's end.
    """

    def __init__(self, ids: torch.Tensor, rows: torch.Tensor, routes: int, ends: torch.Tensor) -> None:
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

    def with_words(self, hidden: torch.Tensor, routed: RoutedPrompts) -> torch.Tensor:
        """Prompts in the places of shared words after the first."""
        count = math.prod(self.sizes[0])
        words = replaced(hidden[0, :count].unflatten(0, self.sizes[0]), routed)
        return torch.cat([words.flatten(0, 1), hidden[0, count:]])[None]

    def joined_by(self, prompts: PromptStates | None) -> PackedStates:
        """Shared words see the prompts of their route, and a text's rest both; `prompts`: (routes, ...)."""

        def joining(keys: list[torch.Tensor], values: list[torch.Tensor]) -> list[PromptStates]:
            nothing = PromptStates(keys[0][:, :0], values[0][:, :0], None)
            beside = nothing if prompts is None else prompts
            before = beside.joined(PromptStates(keys[0], values[0], None))
            return [beside, *(self._of_texts(before, number) for number in range(len(self.order)))]

        return PackedStates(self.sizes, joining)

    def ends_alone(
        self, layer: nn.Module, hidden: torch.Tensor, states: PackedStates
    ) -> tuple[torch.Tensor, PackedStates]:
        """Of what enters the last layer the ends, (1, texts, width), and the others as keys and values."""
        keys, values = (states.parts(part) for part in key_and_value(layer, hidden))
        ends, before = [], []
        for rest, *own, joining, end in zip(
            *(parts[1:] for parts in (states.parts(hidden), keys, values, states.joining(keys, values))), self.ends
        ):
            others = torch.arange(rest.shape[1], device=end.device) < end[:, None]
            before.append(joining.joined(PromptStates(*own, others)))
            ends.append(rest.take_along_dim(end[:, None, None], dim=1))
        sizes = [(len(end), 1) for end in ends]
        return torch.cat(ends).transpose(0, 1), PackedStates(sizes, lambda *_: before)

    def unpacked_ends(self, ends: torch.Tensor) -> torch.Tensor:
        """The ends in the order of the texts: (texts, width)."""
        return take_rows(ends[0], torch.cat(self.order).argsort())

    def _of_texts(self, states: PromptStates, number: int) -> PromptStates:
        """States of routes, (routes, ...), for the texts of one length: (texts, ...), which they stand before."""
        rows, count = self.rows[number], len(self.order[number])
        key, value, valid = (None if part is None else spread(part, rows, count) for part in states[:3])
        return PromptStates(key, value, valid, behind_all=True)


def _equally_long(ends: torch.Tensor) -> list[torch.Tensor]:
    """Numbers of the texts of each length. On a GPU of all texts, which are padded then, since there more and smaller
    batches cost more than padding does."""
    if ends.device.type != "cpu":
        return [torch.arange(len(ends), device=ends.device)]
    return [(ends == end).nonzero()[:, 0] for end in ends.unique()]


def _constant(tower: nn.Module) -> bool:
    """Whether what enters the first prompted layer is the same at every step."""
    random = tower.training and tower.config.attention_dropout > 0
    learning = any(parameter.requires_grad for parameter in tower.parameters())
    return not (random or learning or any(isinstance(module, BaseTunerLayer) for module in tower.modules()))

"""Features of many texts that begin with the same words."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention import SUPPORTED, PromptStates
from .inputs import text_ends
from .layer import key_and_value
from .routing import Routing


def can_share(clip: nn.Module) -> bool:
    """Whether `shared_text_features` holds for a model: its text tower is causal, its prompts stand beside the tokens,
    its attention can be handed keys and values, no layer is told to be plain, and nothing is checkpointed or switched
    off."""
    container, tower = getattr(clip, "mmap", None), getattr(clip, "text_model", None)
    routing = None if container is None else container.current
    if tower is None or routing is None or not routing.index.shape[1] or container.rides(routing):
        return False
    if any(layer.forward.plain for layer in tower.encoder.layers):
        return False
    checkpointed = tower.training and any(
        getattr(layer, "gradient_checkpointing", False) for layer in tower.encoder.layers
    )
    causal = tower.config.model_type.removesuffix("_text_model") in ("clip", "metaclip_2", "clipseg")
    return causal and not checkpointed and tower.config._attn_implementation in SUPPORTED


def shared_text_features(
    clip: nn.Module, ids: torch.Tensor, constants: dict[Hashable, Any] | None = None
) -> torch.Tensor:
    """What `clip.get_text_features(ids).pooler_output` is, for less.

    A causal tower gives the words that all texts of a route begin with the same states in each of them: they run once
    a route, and are keys and values for the rest, beside the prompts. Texts of one length run together, without
    padding. In the last layer only the end of a text is computed, since nothing else is used. Layers before the first
    prompted one can be left out after the first time.

    Args:
        clip (`nn.Module`): a model that `can_share`, inside `use_routes`.
        ids (`torch.Tensor`): (texts, tokens), padded behind the end.
        constants (`dict`, *optional*): of these ids and routes of rows, kept by the caller from call to call: what
            does not depend on the prompts.

    Returns:
        (texts, dim).
    """
    tower, container, layers = clip.text_model, clip.mmap, list(clip.text_model.encoder.layers)
    routing: Routing = container.current
    routes, batch = len(routing.index), len(ids)
    rows = routing.rows.get("text")
    rows = ids.new_zeros(batch) if rows is None else rows.to(ids.device)
    ends = text_ends(ids, tower.config.eos_token_id)
    first = torch.stack([(rows == route).int().argmax() for route in range(routes)])
    equal = (ids == ids[first][rows]).all(dim=0).int().cumprod(dim=0)
    shared = int(min(equal.sum(), ends.min()))  # at least the start
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    routing = replace(routing, rows={"text": torch.arange(routes, device=ids.device)})
    groups = _equally_long(ends)

    def run(
        numbers: range, prefix: torch.Tensor, rests: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        for index in numbers:
            layer = layers[index]
            attention, forward = layer.self_attn, type(layer).forward
            routed = container.routed(routing, "text", index, prefix)
            prompts = prefix[:, :0] if routed is None else routed.of_rows(routed.prompts, routes)
            key, value = key_and_value(layer, torch.cat([prompts, prefix], dim=1))
            count = prompts.shape[1]
            valid = torch.ones(key.shape[:2], dtype=torch.bool, device=ids.device)
            if routed is not None and routed.valid is not None:
                valid[:, :count] = routed.of_rows(routed.valid, routes)
            passed = []
            for group, rest in zip(groups, rests):
                own = rows[group]
                before = PromptStates(key[own], value[own], valid[own], behind_all=True)
                if layer is layers[-1]:
                    last = (ends[group] - shared)[:, None]
                    before = before.joined(
                        PromptStates(*key_and_value(layer, rest), places[:, : rest.shape[1]] < last)
                    )
                    rest = rest.take_along_dim(last[..., None], dim=1)
                with attention.config.joined_by(before):
                    passed.append(forward(layer, rest, None, is_causal=True))
            rests = passed
            if layer is not layers[-1]:
                beside = PromptStates(key[:, :count], value[:, :count], valid[:, :count])
                with attention.config.joined_by(beside):
                    prefix = forward(layer, prefix, None, is_causal=True)
        return prefix, rests

    def begin(until: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        prefix = tower.embeddings(input_ids=ids[first, :shared], position_ids=places[:, :shared])
        rests = []
        for group in groups:
            length = int(ends[group].max()) + 1
            inside = ids[group, shared:length]
            rests.append(tower.embeddings(input_ids=inside, position_ids=places[:, shared:length]))
        return run(range(until), prefix, rests)

    start = container.first_prompted("text", routing, len(layers))
    if constants is None or not _constant(tower):
        states = begin(start)
    else:
        version = tuple((parameter.data_ptr(), parameter._version) for parameter in tower.parameters())
        now = start, version, torch.is_autocast_enabled(ids.device.type)
        if constants.get("of") != now:
            with torch.no_grad():
                constants.update(of=now, states=begin(start))
        states = constants["states"]
    _, rests = run(range(start, len(layers)), *states)
    pooled = torch.cat(rests)[torch.cat(groups).argsort(), 0]
    return clip.text_projection(tower.final_layer_norm(pooled))


def _equally_long(ends: torch.Tensor) -> list[torch.Tensor]:
    """Rows of texts that run together: those of one length, so that none is padded. On a GPU all of them, since there
    more and smaller batches cost more than padding does."""
    if ends.device.type != "cpu":
        return [torch.arange(len(ends), device=ends.device)]
    return [(ends == end).nonzero()[:, 0] for end in ends.unique()]


def _constant(tower: nn.Module) -> bool:
    """Whether what enters the first prompted layer is the same at every step."""
    random = tower.training and tower.config.attention_dropout > 0
    learning = any(parameter.requires_grad for parameter in tower.parameters())
    return not (random or learning or any(isinstance(module, BaseTunerLayer) for module in tower.modules()))

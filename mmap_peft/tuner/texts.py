"""Features of many texts that begin with the same words."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from .attention import SUPPORTED, PromptStates
from .inputs import text_ends
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


def shared_text_features(clip: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What `clip.get_text_features(ids).pooler_output` is, for less.

    A causal tower gives the words that all texts of a route begin with the same states in each of them: they run once
    a route, and are keys and values for the rest, beside the prompts. In the last layer only the end of a text is
    computed, since nothing else is used.

    Args:
        clip (`nn.Module`): a model that `can_share`, inside `use_routes`.
        ids (`torch.Tensor`): (texts, tokens), padded behind the end.

    Returns:
        (texts, dim).
    """
    tower, container = clip.text_model, clip.mmap
    routing: Routing = container.current
    routes, batch = len(routing.index), len(ids)
    rows = routing.rows.get("text")
    rows = ids.new_zeros(batch) if rows is None else rows.to(ids.device)
    ends = text_ends(ids, tower.config.eos_token_id)
    first = torch.stack([(rows == route).int().argmax() for route in range(routes)])
    equal = (ids == ids[first][rows]).all(dim=0).int().cumprod(dim=0)
    shared = int(min(equal.sum(), ends.min()))  # at least the start
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    prefix = tower.embeddings(input_ids=ids[first, :shared], position_ids=places[:, :shared])
    rest = tower.embeddings(input_ids=ids[:, shared:], position_ids=places[:, shared:])
    ends, places = ends - shared, places[:, : ids.shape[1] - shared]
    routing = replace(routing, rows={"text": torch.arange(routes, device=ids.device)})

    layers = tower.encoder.layers
    for index, layer in enumerate(layers):
        attention, forward = layer.self_attn, type(layer).forward
        routed = container.routed(routing, "text", index, prefix)
        prompts = prefix[:, :0] if routed is None else routed.of_rows(routed.prompts, routes)
        key, value = _states(layer, torch.cat([prompts, prefix], dim=1))
        count = prompts.shape[1]
        valid = torch.ones(key.shape[:2], dtype=torch.bool, device=ids.device)
        if routed is not None and routed.valid is not None:
            valid[:, :count] = routed.of_rows(routed.valid, routes)
        before = PromptStates(key[rows], value[rows], valid[rows], behind_all=True)
        if layer is layers[-1]:
            own_key, own_value = _states(layer, rest)
            before = PromptStates(
                torch.cat([before.key, own_key], dim=1),
                torch.cat([before.value, own_value], dim=1),
                torch.cat([before.valid, places < ends[:, None]], dim=1),
                behind_all=True,
            )
            rest = rest[torch.arange(batch, device=ids.device), ends][:, None]
        with attention.config.joined_by(before):
            rest = forward(layer, rest, None, is_causal=True)
        if layer is not layers[-1]:
            beside = PromptStates(key[:, :count], value[:, :count], valid[:, :count])
            with attention.config.joined_by(beside):
                prefix = forward(layer, prefix, None, is_causal=True)
    return clip.text_projection(tower.final_layer_norm(rest[:, 0]))


def _states(layer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    normed = layer.layer_norm1(hidden)
    return layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)

"""One encoder layer with prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import SUPPORTED, PromptAttentionConfig, PromptStates, additive
from .routing import PromptContainer, RoutedPrompts, Routing


class PromptedForward:
    """Takes the place of an encoder layer's `forward`: same arguments, same shape of output, prompts in between.

    Prompts that ride on are among the tokens: they are replaced, and the layer does the rest. For others, which stand
    beside the tokens, there are two exact ways. The fast one hands the prompts to the attention as keys and values.
    The plain one inserts them as tokens after the first and drops what comes out at their places; it is taken where
    the attention cannot be handed anything (flash attention) or where the layer is checkpointed, whose inputs must
    hold all that needs a gradient.

    Where nothing but the first token of the last layer is used, the fast way computes that one alone; the others are
    keys and values too.

    Args:
        layer (`nn.Module`): the encoder layer, with `self_attn` and `layer_norm1`.
        container (`PromptContainer`): where the prompts come from.
        tower (`str`): `"text"` or `"vision"`.
        index (`int`): number of the layer in its tower.
        pools (`bool`): whether the tower pools the first token that comes out of this layer, and nothing else.
    """

    def __init__(
        self, layer: nn.Module, container: PromptContainer, tower: str, index: int, pools: bool = False
    ) -> None:
        self.layer, self.container, self.tower, self.index, self.pools = layer, container, tower, index, pools
        self.plain = False

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        prompt_routing: Routing | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        rides = self.container.rides(prompt_routing)
        routed = None
        if prompt_routing is not None and not (rides and not self.index):  # those are among the tokens already
            routed = self.container.routed(prompt_routing, self.tower, self.index, hidden_states)
        if rides and routed is not None:
            hidden_states, routed = replaced(hidden_states, routed), None
        checkpointed = self.layer.training and getattr(self.layer, "gradient_checkpointing", False)
        supported = self.layer.self_attn.config.base._attn_implementation in SUPPORTED
        fast = supported and not (self.plain or checkpointed)
        first_alone = fast and self.pools and prompt_routing is not None and prompt_routing.pooled
        if routed is None and not first_alone:
            return self._original(hidden_states, attention_mask, **kwargs)
        if not fast:
            return self._insert_and_strip(routed, hidden_states, attention_mask, **kwargs)
        return self._keys_and_values(routed, hidden_states, attention_mask, first_alone, **kwargs)

    def _original(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def _keys_and_values(
        self,
        routed: RoutedPrompts | None,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        first_alone: bool,
        **kwargs: Any,
    ) -> torch.Tensor:
        batch, states = len(hidden_states), None
        if routed is not None:
            states = PromptStates(
                *(routed.of_rows(part, batch) for part in key_and_value(self.layer, routed.prompts)),
                None if routed.valid is None else routed.of_rows(routed.valid, batch),
            )
        if first_alone:
            others = PromptStates(*key_and_value(self.layer, hidden_states[:, 1:]), None)
            states = others if states is None else states.joined(others)
            hidden_states = hidden_states[:, :1]
        with self.layer.self_attn.config.joined_by(states):
            return self._original(hidden_states, mask, **kwargs)

    def _insert_and_strip(
        self, routed: RoutedPrompts, hidden_states: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        batch, length, count = len(hidden_states), hidden_states.shape[1], routed.prompts.shape[1]
        prompts = routed.of_rows(routed.prompts, batch)
        widened = torch.cat([hidden_states[:, :1], prompts, hidden_states[:, 1:]], dim=1)
        valid = None if routed.valid is None else routed.of_rows(routed.valid, batch)
        mask = _widened_mask(mask, batch, length, count, valid, bool(kwargs.get("is_causal")), hidden_states.device)
        if mask is not None and mask.dim() == 4:
            kwargs.pop("is_causal", None)
            if self.layer.self_attn.config.base._attn_implementation == "eager":
                mask = additive(mask, hidden_states.dtype)
        output = self._original(widened, mask, **kwargs)
        return torch.cat([output[:, :1], output[:, 1 + count :]], dim=1)

    @staticmethod
    def attach(layer: nn.Module, container: PromptContainer, tower: str, index: int, pools: bool = False) -> None:
        """Hook a layer."""
        layer.forward = PromptedForward(layer, container, tower, index, pools)
        layer.self_attn.config = PromptAttentionConfig(layer.self_attn.config)

    @staticmethod
    def detach(layer: nn.Module) -> None:
        """Give a hooked layer back as it was."""
        del layer.forward
        layer.self_attn.config = layer.self_attn.config.base


def key_and_value(layer: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What tokens are to those that attend to them in an encoder layer: two tensors of their shape."""
    normed = layer.layer_norm1(hidden_states)
    return layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)


def replaced(hidden_states: torch.Tensor, routed: RoutedPrompts) -> torch.Tensor:
    """Prompts in the places of those that came out of the layer before; where there are none, those ride on."""
    batch, count = len(hidden_states), routed.prompts.shape[1]
    prompts = routed.of_rows(routed.prompts, batch)
    if routed.valid is not None:
        valid = routed.of_rows(routed.valid, batch)[..., None]
        prompts = torch.where(valid, prompts, hidden_states[:, 1 : count + 1])
    return torch.cat([hidden_states[:, :1], prompts, hidden_states[:, count + 1 :]], dim=1)


def _widened_mask(
    mask: torch.Tensor | None,
    batch: int,
    length: int,
    count: int,
    valid: torch.Tensor | None,
    causal: bool,
    device: torch.device,
) -> torch.Tensor | None:
    """The mask for tokens with `count` prompts after the first of them: none, 2-D as given, or boolean 4-D."""
    if mask is None and valid is None:
        return None  # the implementation makes its own causal mask, for whatever length
    if mask is not None and mask.dim() == 2:  # flash attention: which keys are real
        seen = mask.new_ones(batch, count) if valid is None else valid.to(mask.dtype)
        return torch.cat([mask[:, :1], seen, mask[:, 1:]], dim=1)
    full = length + count
    if mask is None:
        tokens = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
        tokens = tokens.tril() if causal else tokens
    else:
        tokens = mask if mask.dtype == torch.bool else mask == 0
    wide = torch.ones(batch, 1, full, full, dtype=torch.bool, device=device)
    wide = wide.tril() if causal else wide
    token = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(count + 1, full)]).to(device)
    wide[:, :, token[:, None], token] = tokens.expand(batch, 1, length, length)
    if valid is not None:
        wide[:, :, :, 1 : count + 1] &= valid[:, None, None, :]
    return wide

"""Attention with the keys and values of prompts.

A prompt whose output is dropped only acts as one more key and value. So the attention of a layer gets the keys and
values of the prompts, and the prompts need not pass through the rest of the layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


SUPPORTED = ("eager", "sdpa")


class PromptStates(NamedTuple):
    """What the prompts add to one layer's attention.

    Attributes:
        key, value: (batch, prompts, width).
        valid: (batch, prompts), false where a row has fewer prompts; `None` if all are real.
        before_all: whether they come before the first token of a causal sequence, which then attends to them, too;
            otherwise they come after it.
    """

    key: torch.Tensor
    value: torch.Tensor
    valid: torch.Tensor | None
    before_all: bool = False

    def joined(self, other: PromptStates) -> PromptStates:
        """These, followed by others."""
        key, value = torch.cat([self.key, other.key], dim=1), torch.cat([self.value, other.value], dim=1)
        if self.valid is None and other.valid is None:
            return PromptStates(key, value, None, self.before_all)
        valid = [
            states.key.new_ones(states.key.shape[:2], dtype=torch.bool) if states.valid is None else states.valid
            for states in (self, other)
        ]
        return PromptStates(key, value, torch.cat(valid, dim=1), self.before_all)


class PackedStates(NamedTuple):
    """What the prompts add to the attention of several batches of sequences that are packed into one row of tokens.
    Attention runs on each batch by itself, everything else on the whole row.

    Attributes:
        sizes: (sequences, tokens) of each batch.
        joining: returns the `PromptStates` of each batch, given the keys and the values of all batches, (sequences,
            tokens, width) each.
    """

    sizes: Sequence[tuple[int, int]]
    joining: Callable[[list[torch.Tensor], list[torch.Tensor]], Sequence[PromptStates]]

    def parts(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Split a packed tensor, (1, tokens, ...), into its batches, (sequences, tokens, ...) each."""
        parts = packed[0].split([sequences * tokens for sequences, tokens in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes)]


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a boolean mask to one that eager attention adds to its scores."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def joined_mask(
    mask: torch.Tensor | None, query: torch.Tensor, tokens: int, prompts: PromptStates, causal: bool
) -> torch.Tensor | None:
    """The mask for queries, (batch, heads, length, size), over keys of tokens and then of prompts; `None` if every
    query attends to every key."""
    if mask is None and not causal and prompts.valid is None:
        return None
    length, count = query.shape[2], prompts.key.shape[1]
    if mask is None:
        mask = torch.ones(length, tokens, dtype=torch.bool, device=query.device)
        mask = (mask.tril() if causal else mask)[None, None]
    seen = torch.ones(1, 1, length, count, dtype=torch.bool, device=query.device)
    if causal and not prompts.before_all:
        seen[:, :, 0] = False
    if prompts.valid is not None:
        seen = seen & prompts.valid[:, None, None, :]
    if mask.dtype != torch.bool:
        seen = additive(seen, mask.dtype)
    batch = max(mask.shape[0], seen.shape[0])  # not len(), which is one number when it is traced
    return torch.cat([mask.expand(batch, *mask.shape[1:]), seen.expand(batch, mask.shape[1], -1, -1)], dim=-1)


def _with_prompts(name: str) -> Callable:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        prompt_states: PromptStates | PackedStates | None = None,
        prompts: Any = None,  # the layer passes on its keyword arguments
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Each modeling file has its own eager function; the registry holds the other functions.
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        base = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        if prompt_states is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        if isinstance(prompt_states, PackedStates):
            return _packed(attention, module, (query, key, value), prompt_states, **kwargs)
        causal = bool(kwargs.pop("is_causal", False))
        mask = joined_mask(attention_mask, query, key.shape[2], prompt_states, causal)
        if name == "eager" and mask is not None and mask.dtype == torch.bool:
            mask = additive(mask, query.dtype)
        batch, heads, _, size = key.shape

        def joined(states: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
            return torch.cat([states, extra.view(batch, -1, heads, size).transpose(1, 2).to(states.dtype)], dim=2)

        key, value = joined(key, prompt_states.key), joined(value, prompt_states.value)
        return base(module, query, key, value, mask, is_causal=False, **kwargs)

    return attention


def _packed(
    attention: Callable, module: nn.Module, states: Sequence[torch.Tensor], packed: PackedStates, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention of each batch by itself; `states`: query, key and value of all batches, (1, heads, tokens, size)."""
    query, key, value = (packed.parts(part.transpose(1, 2)) for part in states)
    joining = packed.joining([part.flatten(2) for part in key], [part.flatten(2) for part in value])
    outputs = []
    for *of_batch, prompts in zip(query, key, value, joining):
        parts = (part.transpose(1, 2) for part in of_batch)
        outputs.append(attention(module, *parts, None, prompt_states=prompts, **kwargs)[0].flatten(0, 1))
    return torch.cat(outputs)[None], None


for _name in SUPPORTED:
    AttentionInterface.register(f"mmap_{_name}", _with_prompts(_name))


def takes_prompts(model: nn.Module) -> bool:
    """Whether prompts enter layers of a model, be they its own or those of another model that shares its towers."""
    return any(isinstance(getattr(module, "config", None), PromptAttentionConfig) for module in model.modules())


class PromptAttentionConfig:
    """Replaces the config of an attention module, so that the module calls the functions above.

    The model's own config, `base`, does not change, so masks are made for the implementation that the user chose, and
    `set_attn_implementation` works.
    """

    def __init__(self, base: Any) -> None:
        self.base = base

    @property
    def _attn_implementation(self) -> str:
        name = self.base._attn_implementation
        return f"mmap_{name}" if name in SUPPORTED else name

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):  # asked while a copy or a pickle is made
            raise AttributeError(name)
        return getattr(self.base, name)

"""The hooks of a tower with prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .assemble import Prompts
from .container import PromptContainer
from .layer import is_siglip, start_tokens, without_prompts


class PromptedTower:
    """The hooks of a tower and its encoder: `enter` before their forward, `leave` after that of the tower.

    If the keyword argument `prompts` was not passed, `enter` fills it in from the active adapters, so that a model
    with prompts is called like the model itself. `name` is that of the tower, `"text"` or `"vision"`.
    """

    def __init__(self, container: PromptContainer, name: str) -> None:
        self.container, self.name = container, name

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with `prompts` among them."""
        prompts: Prompts | None = kwargs.get("prompts")
        if prompts is None:
            prompts = self.container.prompts([self.name])
        if prompts is not None and prompts.stays_in_sequence and self.name == "text" and prompts.text_ends is None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is not None and not ids.is_floating_point():
                prompts = with_ends(prompts, ids.view(-1, ids.shape[-1]), module)
        return args, {**kwargs, "prompts": prompts}

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The output, with prompts removed from the hidden states of all layers."""
        prompts: Prompts | None = kwargs.get("prompts")
        count, depth = 0 if prompts is None else prompts.length(self.name), len(module.encoder.layers)
        # With return_dict=False it is a tuple. There is one more of hidden states than of layers and attentions.
        parts = output.to_tuple() if isinstance(output, dict) else output
        states = next((part for part in parts if isinstance(part, tuple) and len(part) == depth + 1), None)
        if not count or states is None:
            return output
        first, tokens = prompts.first_layer(self.name), parts[0].shape[1]

        def is_longer(index: int, state: torch.Tensor) -> bool:
            if prompts.stays_in_sequence:
                # Of all but the first layer, outputs are recorded: what enters a later layer has no prompts yet.
                return self.name == "vision" and (index == first == 0 or first < index < depth)
            # A pooled pass computes one token in its last layer, and has no prompts as tokens then.
            return 1 < tokens < state.shape[1]

        # A model may set hidden states that it does not need to None.
        cut = tuple(
            without_prompts(state, count) if state is not None and is_longer(index, state) else state
            for index, state in enumerate(states)
        )
        if not isinstance(output, dict):
            return tuple(cut if part is states else part for part in output)
        output["hidden_states"] = cut
        return output


def text_ends(ids: torch.Tensor, tower: nn.Module) -> torch.Tensor:
    """Place of the end of each text: (batch,). The last place, if a text has no end."""
    config = tower.config
    # It stands in old configs of CLIP, whose end of text has the highest id. That of MetaCLIP 2 has the id 2.
    if config.eos_token_id == 2 and not config.model_type.startswith("metaclip_2"):
        return ids.argmax(-1)
    is_end = ids == config.eos_token_id
    if is_siglip(tower):  # whose texts end with what pads them, another token than its config says
        is_end = is_end | (ids == config.pad_token_id)
    return torch.where(is_end.any(-1), is_end.int().argmax(-1), ids.shape[1] - 1)


def with_ends(prompts: Prompts, ids: torch.Tensor, tower: nn.Module) -> Prompts:
    """The prompts with the end of each text. Values of `ids` are read, so in the memory of the CPU they are faster.

    Raises:
        ValueError: prompts would replace the end of a text, or all words of texts that differ.
    """
    count, ends = prompts.length("text"), text_ends(ids, tower)
    unchecked = torch.compiler.is_compiling() or torch.jit.is_tracing()  # a look at the values would break the graph
    if count and not unchecked:
        start = start_tokens(tower, "text")
        reached = start + count  # the first place that prompts do not take
        without_words = ids[ends == reached, :reached]
        if bool((ends < reached).any()) or len(without_words.unique(dim=0)) > 1:
            raise ValueError(
                f"Texts have {int(ends.min()) + 1} tokens with start and end, but {count} prompts take the places of "
                f"as many{' after the first' * start}; write a word for each prompt before the class name, such as "
                "'X X X X cat.'"
            )
    return replace(prompts, text_ends=ends)

"""Where prompts that ride on enter a tower, and where they leave it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .routing import PromptContainer


class WordHook:
    """After the token embedding of a text tower: prompts take the places of the tokens after the first.

    Positions are added later, so that prompts get those of the tokens that they replace.

    Args:
        container (`PromptContainer`): where the prompts come from.
        eos_token_id (`int`): ends a text.
    """

    def __init__(self, container: PromptContainer, eos_token_id: int) -> None:
        self.container, self.eos_token_id = container, eos_token_id

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        routed = self.container.entering("text", output)
        if routed is None:
            return output
        prompts = routed.of_rows(routed.prompts, len(output))
        count = prompts.shape[1]
        if output.shape[1] < count + 2:
            raise ValueError(
                f"Texts have {output.shape[1]} tokens with start and end, but {count} prompts take the places of as "
                "many after the first; write a word for each prompt before the class name, such as 'X X X X cat.'"
            )
        words = torch.cat([output[:, :1], prompts.to(output.dtype), output[:, count + 1 :]], dim=1)
        position = self.container.position
        if position == "end":
            return words
        order = name_order(position, text_ends(args[0], self.eos_token_id), count, output.shape[1])
        return words.gather(1, order[..., None].expand_as(words))


def text_ends(ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Place of the end of each text: (batch,)."""
    # 2 stands in old configs of CLIP, whose end of text has the highest id.
    return ids.argmax(-1) if eos_token_id == 2 else (ids == eos_token_id).int().argmax(-1)


def name_order(position: str, ends: torch.Tensor, prompts: int, length: int) -> torch.Tensor:
    """Which token of `[start, prompts, name, full stop, end, ...]` comes at each place if the name moves.

    Args:
        position: `"front"` or `"middle"`, of the name.
        ends: (batch,), place of the end of each text; it does not move.
        prompts: how many.
        length: of the texts.

    Returns:
        (batch, length), numbers of tokens.
    """
    before = 0 if position == "front" else prompts // 2  # prompts before the name
    name = (ends - prompts - 2)[:, None]  # tokens of each name: start and full stop are no part of it
    place = torch.arange(length, device=ends.device)[None]
    order = torch.where((place > before) & (place <= before + name), place + prompts - before, place)
    return torch.where((place > before + name) & (place <= prompts + name), place - name, order)


class PatchHook:
    """After the embeddings of a vision tower, so before its first norm: prompts stand after the first token.

    Args:
        container (`PromptContainer`): where the prompts come from.
    """

    def __init__(self, container: PromptContainer) -> None:
        self.container = container

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        routed = self.container.entering("vision", output)
        if routed is None:
            return output
        prompts = routed.of_rows(routed.prompts, len(output))
        return torch.cat([output[:, :1], prompts.to(output.dtype), output[:, 1:]], dim=1)


class LeaveHook:
    """After the last layer of a vision tower: the tokens alone go on.

    Args:
        container (`PromptContainer`): where the prompts came from.
    """

    def __init__(self, container: PromptContainer) -> None:
        self.container = container

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        routed = self.container.entering("vision", output.last_hidden_state)
        if routed is not None:
            hidden = output.last_hidden_state
            output.last_hidden_state = torch.cat([hidden[:, :1], hidden[:, 1 + routed.prompts.shape[1] :]], dim=1)
        return output


def attach(towers: dict[str, nn.Module], container: PromptContainer) -> None:
    """Hook the towers of a model."""
    for name, tower in towers.items():
        if name == "text":
            hook = WordHook(container, tower.config.eos_token_id)
            tower.embeddings.token_embedding.register_forward_hook(hook)
        else:
            tower.embeddings.register_forward_hook(PatchHook(container))
            tower.encoder.register_forward_hook(LeaveHook(container))


def detach(tower: nn.Module) -> None:
    """Take all of these hooks off a tower."""
    for module in tower.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, (WordHook, PatchHook, LeaveHook)):
                del module._forward_hooks[key]

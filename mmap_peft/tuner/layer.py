"""One encoder layer with prompts."""

from __future__ import annotations

import functools

import torch
from torch import nn

from .assemble import LayerPrompts, Prompts, wrong_classes
from .attention import SUPPORTED, PromptStates, additive, joined_mask


# Families (`model_type` of the towers without its ending) whose layers pass keyword arguments on to the attention, so
# that prompts can be keys and values of it. SigLIP's layers do not.
PASSES_KEYWORDS = ("clip", "metaclip_2", "clipseg")


def passes_keywords(tower: nn.Module) -> bool:
    """Whether prompts can be keys and values in the attention of a tower."""
    return tower.config.model_type.removesuffix("_model").rpartition("_")[0] in PASSES_KEYWORDS


def is_siglip(tower: nn.Module) -> bool:
    """Whether a tower is one of SigLIP or SigLIP 2."""
    return tower.config.model_type.startswith("siglip")


def start_tokens(tower: nn.Module, name: str) -> int:
    """How many tokens of a sequence prompts stand behind: one, but none where SigLIP's texts have no start."""
    return 0 if name == "text" and is_siglip(tower) else 1


class PromptedLayer:
    """The hooks of an encoder layer: `enter` before its forward, `leave` after it.

    They depend only on the layer's keyword argument `prompts`. Prompts that stay in the sequence are tokens: they
    enter at the first prompted layer, and those of a deeper layer replace them. For other prompts there are two ways
    with the same result:

    * The fast way passes the prompts to the attention as keys and values. If only the first token of the last layer
      is used, the last layer computes only this token, and the other tokens are keys and values, too.
    * The plain way adds the prompts as tokens after the first one and removes their outputs. It is used where the
      attention accepts no further keys and values (flash attention, SigLIP), and where the layer is checkpointed,
      since checkpointing may pass gradients to positional arguments only.

    `name` is the name of the tower, `"text"` or `"vision"`, and `index` the number of the layer in it.
    """

    def __init__(self, tower: nn.Module, name: str, index: int) -> None:
        self.tower, self.name, self.index = tower, name, index
        self.last_of_images = index == len(tower.encoder.layers) - 1 and name == "vision"

    def enter(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The arguments of the layer with prompts in them."""
        prompts: Prompts | None = kwargs.get("prompts")
        if prompts is None:
            return None
        hidden_states, *rest = args or (kwargs.pop("hidden_states"),)
        mask = rest.pop(0) if rest else kwargs.pop("attention_mask", None)
        here, states = prompts.layers.get((self.name, self.index)), None
        if here is not None and prompts.stays_in_sequence:
            hidden_states = self._in_sequence(here, hidden_states, prompts)
        elif here is not None and self._fast(layer, prompts):
            key, value = here.key_and_value or key_and_value(layer, here.states.to(hidden_states))
            states = PromptStates(*(self._of_rows(part, prompts, hidden_states) for part in (key, value, here.real)))
        elif here is not None:
            hidden_states, mask, kwargs = self._widened(layer, here, hidden_states, mask, prompts, kwargs)
        # All families whose attention takes keys and values pool the first token of an image.
        if prompts.pooled and self.last_of_images and self._fast(layer, prompts):
            others = PromptStates(*key_and_value(layer, hidden_states[:, 1:]), None)
            states = others if states is None else states.joined(others)
            hidden_states = hidden_states[:, :1]
        if states is not None:
            kwargs = {**kwargs, "prompt_states": states}
        return (hidden_states, mask, *rest), kwargs

    def leave(self, layer: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
        """The output of the layer without prompts, unless they stay."""
        prompts: Prompts | None = kwargs.get("prompts")
        if prompts is None:
            return None
        if prompts.stays_in_sequence:
            added = self.last_of_images and prompts.length(self.name)
        else:
            added = (self.name, self.index) in prompts.layers and not self._fast(layer, prompts)
        return without_prompts(output, prompts.length(self.name)) if added else None

    def _fast(self, layer: nn.Module, prompts: Prompts) -> bool:
        checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
        supported = passes_keywords(self.tower) and layer.self_attn.config.base._attn_implementation in SUPPORTED
        return supported and not (prompts.as_tokens or checkpointed)

    def _of_rows(
        self, part: torch.Tensor | None, prompts: Prompts, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """Expand a tensor of routes to the rows of a batch, on the device of `hidden_states`."""
        batch, device = hidden_states.shape[0], hidden_states.device
        return None if part is None else prompts.spread(self.name, part, batch).to(device)

    def _widened(
        self,
        layer: nn.Module,
        here: LayerPrompts,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None,
        prompts: Prompts,
        kwargs: dict,
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict]:
        states = self._of_rows(here.states.to(hidden_states), prompts, hidden_states)
        real = self._of_rows(here.real, prompts, hidden_states)
        mask = _widened_mask(mask, hidden_states, states, real, bool(kwargs.get("is_causal")))
        if mask is not None and mask.dim() == 4:
            kwargs = {name: value for name, value in kwargs.items() if name != "is_causal"}
            if mask.dtype == torch.bool and layer.self_attn.config.base._attn_implementation == "eager":
                mask = additive(mask, hidden_states.dtype)
        return torch.cat([hidden_states[:, :1], states, hidden_states[:, 1:]], dim=1), mask, kwargs

    def _in_sequence(self, here: LayerPrompts, hidden_states: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        """The tokens with the prompts of this layer, (batch, tokens, width), where prompts stay in the sequence.

        At the first prompted layer, prompts are added after the first token of an image; in a text they replace the
        tokens after the first. At deeper layers they replace the prompts of the layer before, except where a route
        has no prompts for this layer.
        """
        first, batch = self.index == prompts.first_layer(self.name), hidden_states.shape[0]
        states = here.states.to(hidden_states)
        if first and self.index == 0:
            states = first_states(self.tower, self.name, states)
        if here.per_row and states.shape[0] != batch:
            raise wrong_classes(batch, states.shape[0])
        states = states if here.per_row else self._of_rows(states, prompts, hidden_states)
        if first and self.name == "vision":
            return torch.cat([hidden_states[:, :1], states, hidden_states[:, 1:]], dim=1)
        real = self._of_rows(here.real, prompts, hidden_states)
        hidden_states = replaced(hidden_states, states, real, start_tokens(self.tower, self.name))
        if first and prompts.position != "end":
            return self._with_names_moved(hidden_states, prompts, states.shape[1])
        return hidden_states

    def _with_names_moved(self, hidden_states: torch.Tensor, prompts: Prompts, count: int) -> torch.Tensor:
        if prompts.text_ends is None:
            raise ValueError(
                f"position={prompts.position!r} needs the end of each text, which is unknown if the encoder is called "
                "directly; call the model or its text tower."
            )
        length, device = hidden_states.shape[1], hidden_states.device
        positions = self.tower.embeddings.position_embedding(torch.arange(length, device=device)).to(hidden_states)
        missing = 1 - start_tokens(self.tower, self.name)  # places are counted with a start
        ends = prompts.text_ends.to(device) + missing
        order = name_order(prompts.position, ends, count, length + missing)[:, missing:] - missing
        words = hidden_states - positions
        return words.gather(1, order[..., None].expand_as(words)) + positions


def key_and_value(layer: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of tokens in the attention of an encoder layer: two tensors of their shape."""
    normed = layer.layer_norm1(hidden_states)
    return layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)


def without_prompts(hidden_states: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens without the `count` prompts after the first token."""
    return torch.cat([hidden_states[:, :1], hidden_states[:, 1 + count :]], dim=1)


def replaced(
    hidden_states: torch.Tensor, states: torch.Tensor, real: torch.Tensor | None, start: int = 1
) -> torch.Tensor:
    """Tokens of which those from a place on are replaced by states, where these are real."""
    stop = start + states.shape[1]
    if real is not None:
        states = torch.where(real.to(states.device)[..., None], states, hidden_states[:, start:stop])
    return torch.cat([hidden_states[:, :start], states, hidden_states[:, stop:]], dim=1)


def first_states(tower: nn.Module, name: str, states: torch.Tensor) -> torch.Tensor:
    """Prompts as inputs of layer 0: text prompts get position embeddings, vision prompts pass the norm before it."""
    if name == "text":
        start = start_tokens(tower, name)
        places = torch.arange(start, start + states.shape[1], device=states.device)
        return states + tower.embeddings.position_embedding(places).to(states)
    norm = getattr(tower, "pre_layrnorm", None)  # SigLIP has none
    return states if norm is None else norm(states)


def name_order(position: str, ends: torch.Tensor, prompts: int, length: int) -> torch.Tensor:
    """Which token of `[start, prompts, name, full stop, end, ...]` comes at each place, (batch, length), if the name
    moves to the `"front"` of the prompts or into their `"middle"`. `ends` are the positions of the end tokens,
    (batch,), which do not move.
    """
    before = 0 if position == "front" else prompts // 2  # prompts before the name
    name = (ends - prompts - 2)[:, None]  # tokens of each name: start and full stop are no part of it
    place = torch.arange(length, device=ends.device)[None]
    order = torch.where((place > before) & (place <= before + name), place + prompts - before, place)
    return torch.where((place > before + name) & (place <= prompts + name), place - name, order)


def _widened_mask(
    mask: torch.Tensor | None,
    hidden_states: torch.Tensor,
    states: torch.Tensor,
    real: torch.Tensor | None,
    causal: bool,
) -> torch.Tensor | None:
    """The mask for tokens with prompts after the first of them: none, 2-D as given, or 4-D."""
    if mask is None and real is None:
        return None  # the implementation makes a causal mask of any length
    length, count, device = hidden_states.shape[1], states.shape[1], hidden_states.device
    if mask is not None and mask.dim() == 2:  # flash attention: which keys are real
        seen = mask.new_ones(states.shape[:2]) if real is None else real.to(mask.dtype)
        return torch.cat([mask[:, :1], seen, mask[:, 1:]], dim=1)
    mask = joined_mask(mask, hidden_states[:, None], length, PromptStates(states, states, real), causal)
    # The outputs of prompts are dropped, so they may attend to what the first token attends to.
    rows = (torch.arange(length + count, device=device) - count).clamp(min=0)
    places = functools.partial(torch.arange, device=device)
    keys = torch.cat([places(1), places(length, length + count), places(1, length)])
    return mask[:, :, rows][..., keys]

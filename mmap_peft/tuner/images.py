"""The image tower in two parts: what is the same at every step, and what adapters change."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.utils import parametrize

from .assemble import Prompts
from .container import PromptContainer
from .layer import passes_keywords


_HARMLESS = (f"{__package__}.", "transformers.")  # modules whose hooks change no value below the first prompts


class ImageStates(NamedTuple):
    """What enters a layer of the image tower, in place of the pixels of a batch.

    Attributes:
        layer: number of the layer, as `first_changed_layer` counts.
        states: (images, tokens, width). For number L of L layers the first tokens, (images, 1, width); for L + 1 the
            image features, (images, dim), which are not of unit length.
    """

    layer: int
    states: torch.Tensor

    def to(self, device: torch.device) -> ImageStates:
        """The same on a device."""
        return self._replace(states=self.states.to(device))


def first_changed_layer(clip: nn.Module) -> int:
    """Number of the first encoder layer of the image tower that adapters change, counted from 0: what comes before it
    computes the same for an image at every step.

    With L layers it is L if adapters change none of them. A tower that cannot be run from a layer on, which only those
    of `PASSES_KEYWORDS` can, has 0, or L + 1 if adapters change nothing in it. It is also 0 if they change what comes
    before the layers, or if the tower is random, is offloaded, or has hooks whose effect is unknown.
    """
    tower = getattr(clip, "vision_model", None)
    if tower is None or not hasattr(tower, "encoder") or _is_random(tower):
        return 0
    if any(hasattr(part, "_hf_hook") for part in clip.modules()) or any(part.is_meta for part in tower.parameters()):
        return 0
    if any(_has_hooks(part) for part in (clip, tower, tower.encoder)):
        return 0
    before, after = _around(clip)
    parts = [before, *([layer] for layer in tower.encoder.layers), after]
    changed = [number - 1 for number, part in enumerate(parts) if any(map(_is_changed, part))]
    first, layers = min([*changed, *_prompted(clip), len(parts) - 1]), len(parts) - 2
    if not _can_be_split(clip):
        return first if first > layers else 0
    return max(0, min(first, layers))  # not of the projection: its last bits depend on the number of images


def _prompted(clip: nn.Module) -> Iterator[int]:
    for module in clip.modules():
        if isinstance(module, PromptContainer):
            yield from (index for places in module.layers.values() for tower, index in places if tower == "vision")


def _around(clip: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """What comes before the encoder layers of the image tower, and what comes after them."""
    children = list(clip.vision_model.children())
    place = children.index(clip.vision_model.encoder)
    projection = getattr(clip, "visual_projection", None)
    return children[:place], [*children[place + 1 :], *([] if projection is None else [projection])]


def _can_be_split(clip: nn.Module) -> bool:
    tower = clip.vision_model
    own = (type(clip).get_image_features, type(tower).forward)  # not those of a subclass of a user
    return passes_keywords(tower) and all(each.__module__.startswith("transformers.") for each in own)


def _is_random(tower: nn.Module) -> bool:
    dropout = (part.p for part in tower.modules() if isinstance(part, nn.modules.dropout._DropoutNd))
    return getattr(tower.config, "attention_dropout", 0) > 0 or any(dropout)


def _is_changed(part: nn.Module) -> bool:
    """Whether something in a module trains, or is not as it was loaded."""
    return any(parameter.requires_grad for parameter in part.parameters()) or any(
        isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper)
        or parametrize.is_parametrized(each)
        or _has_hooks(each)
        for each in part.modules()
    )


def _has_hooks(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith(_HARMLESS) for hook in hooks)


def constant_parameters(clip: nn.Module, layer: int) -> list[torch.Tensor]:
    """Parameters and buffers of what computes the states that enter a layer."""
    before, after = _around(clip)
    layers = list(clip.vision_model.encoder.layers)
    parts = [*before, *layers[:layer], *(after if layer > len(layers) else [])]
    return list(dict.fromkeys(tensor for part in parts for tensor in (*part.parameters(), *part.buffers())))


def image_states(clip: nn.Module, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """The `states` of `ImageStates` that enter this layer, of pixels, (images, 3, height, width)."""
    tower = clip.vision_model
    if layer > len(tower.encoder.layers):
        return clip.get_image_features(pixels).pooler_output
    interpolates = inspect.signature(clip.get_image_features).parameters["interpolate_pos_encoding"].default
    hidden = tower.pre_layrnorm(tower.embeddings(pixels, interpolate_pos_encoding=interpolates))
    for each in tower.encoder.layers[:layer]:
        hidden = each(hidden, None)
    return hidden if layer < len(tower.encoder.layers) else hidden[:, :1]


def image_features(
    clip: nn.Module, images: torch.Tensor | ImageStates, prompts: Prompts | None = None
) -> torch.Tensor:
    """Image features, (images, dim), which are not of unit length, of pixels or of what enters a layer."""
    keywords: dict[str, Any] = {} if prompts is None else {"prompts": prompts}
    if not isinstance(images, ImageStates):
        return clip.get_image_features(images, **keywords).pooler_output
    (layer, hidden), tower = images, clip.vision_model
    layers = tower.encoder.layers
    if layer > len(layers):
        return hidden
    if torch.is_grad_enabled() and any(getattr(each, "gradient_checkpointing", False) for each in layers[layer:]):
        hidden = hidden.detach().requires_grad_()  # a reentrant checkpoint needs it, to pass gradients to the prompts
    for each in layers[layer:]:
        hidden = each(hidden, None, **keywords)
    return clip.visual_projection(tower.post_layernorm(hidden[:, 0]))

"""An image classifier of a single task, with pixels as input and probabilities as output."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..tuner.assemble import LayerPrompts, Prompts
from ..tuner.attention import SUPPORTED
from ..tuner.layer import key_and_value, passes_keywords
from ..tuner.model import find_towers


class TaskClassifier(nn.Module):
    """The image classifier of one task, in float32: pixels (batch, 3, H, W) in, probabilities (batch, classes) out.

    It holds copies of the vision tower, of the task's prompts and of the features of its classes, but not the text
    tower, PEFT's modules or other tasks. None of it trains. Created by `MultiTaskClassifier.export`.

    Args:
        clip (`nn.Module`): the CLIP to copy the vision tower from; it is not changed.
        prompts (`Prompts`, *optional*): the task's prompts for the vision tower.
        class_weight (`torch.Tensor`): (classes, dim), the weight that unit image features are multiplied by.
        class_bias (`torch.Tensor`, *optional*): (classes).
        task (`str`), class_names (`Sequence[str]`): name of the task, and names of its classes.
        image_processor: prepares the pixels.
        part (`nn.Module`, *optional*): what the task has on pooled features, a `PooledModule`; it is copied.
        columns (`Sequence[int]`, *optional*): numbers of the classes among the task's own, for logits that `part`
            adds. `None`: it adds none.

    Attributes:
        class_names (`list[str]`): the class of each column of the output.
        metadata (`dict[str, str]`): what is needed to prepare pixels and to read the output: `task`, and as JSON
            `class_names`, `image_size`, `image_mean`, `image_std` and `image_processor` (all its settings).

    Raises:
        ValueError: the base is quantised.
    """

    @torch.no_grad()
    def __init__(
        self,
        clip: nn.Module,
        prompts: Prompts | None,
        class_weight: torch.Tensor,
        class_bias: torch.Tensor | None,
        task: str,
        class_names: Sequence[str],
        image_processor: Any,
        part: nn.Module | None = None,
        columns: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if any(not _is_float(parameter) for parameter in clip.parameters()):
            raise ValueError(
                "The base is quantised, but an exported task is float32; load the adapters onto float weights, for "
                "example MultiTaskClassifier.from_pretrained(folder, model=base.dequantize()), and export that."
            )
        self.vision_model = _copy_of_tower(clip).float()
        # SigLIP has no projection: its tower computes the features itself.
        self.visual_projection = copy.deepcopy(getattr(clip, "visual_projection", nn.Identity())).float()
        self._prompts = replace(prompts or Prompts(), layers={}, rows={}, pooled=False)  # the rest is in the buffers
        self._layers = {}
        for (_, index), here in (prompts or Prompts()).layers.items():
            self._layers[index] = layer = find_towers(self.vision_model)["vision"].encoder.layers[index]
            states = here.states.float().clone()
            if self._prompts.stays_in_sequence or not passes_keywords(clip.vision_model):
                layer.register_buffer("prompt_states", states)
            else:
                for name, tensor in zip(("prompt_key", "prompt_value"), key_and_value(layer, states)):
                    layer.register_buffer(name, tensor)
        self.class_weight = nn.Buffer(class_weight.float().clone())
        self.class_bias = None if class_bias is None else nn.Buffer(class_bias.float().clone())
        self.part = copy.deepcopy(part)
        self._columns = None if part is None or not part.adds_logits or columns is None else list(columns)
        self.requires_grad_(False).eval()

        self.class_names = list(class_names)
        self.image_size: int = self.vision_model.config.image_size
        self.metadata = {"task": task, **self._fields(image_processor)}

    def _fields(self, image_processor: Any) -> dict[str, str]:
        fields = {
            "class_names": self.class_names,
            "image_size": self.image_size,
            "image_mean": image_processor.image_mean,
            "image_std": image_processor.image_std,
            "image_processor": json.loads(image_processor.to_json_string()),
        }
        return {name: json.dumps(value) for name, value in fields.items()}

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        layers = {("vision", index): _layer_prompts(layer) for index, layer in self._layers.items()}
        keywords = {"prompts": replace(self._prompts, layers=layers)} if layers else {}
        image = self.visual_projection(self.vision_model(pixel_values, **keywords).pooler_output)
        image = image if self.part is None else self.part.image_features(image)
        image = F.normalize(image, dim=-1)
        logits = F.linear(image, self.class_weight, self.class_bias)
        if self._columns is not None:
            logits = logits + self.part.added_logits(image)[:, self._columns]
        return logits.softmax(dim=-1)


def _layer_prompts(layer: nn.Module) -> LayerPrompts:
    if hasattr(layer, "prompt_states"):
        return LayerPrompts(layer.prompt_states, None)
    # With keys and values, only the number of the prompts is read from `states`.
    return LayerPrompts(layer.prompt_key, None, key_and_value=(layer.prompt_key, layer.prompt_value))


def _is_float(parameter: torch.Tensor) -> bool:
    # Quantised weights are integers, or of a tensor class of their own that reports a float dtype.
    return parameter.is_floating_point() and type(parameter.data) is torch.Tensor


def _copy_of_tower(clip: nn.Module) -> nn.Module:
    """A copy of the vision tower whose layers accept prompts, without the hooks that compute prompts from adapters."""
    tower, container = clip.vision_model, getattr(clip, "mmap", None)
    vision = find_towers(tower)["vision"]
    in_tower = [hooks for part in (vision, vision.encoder) for hooks in (part._forward_hooks, part._forward_pre_hooks)]
    handles = [] if container is None else container.handles
    handles = [handle for handle in handles if any(handle.hooks_dict_ref() is hooks for hooks in in_tower)]
    # The handles are copied with the tower, and then remove the hooks of the copy. The container is not copied.
    tower, handles = copy.deepcopy((tower, handles), {id(container): container})
    for handle in handles:
        handle.remove()
    if tower.config._attn_implementation not in SUPPORTED:
        tower.set_attn_implementation("sdpa")
    return tower

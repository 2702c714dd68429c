"""The PEFT tuner of all prompt methods."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from ..prompts.base import PromptConfig, TowerShape
from .layer import PromptedForward
from .routing import PromptContainer, RoutingHook


RESERVED = ("base_model", "mmap", "model")
ENCODER_LAYERS = r"(.*\.)?encoder\.layers\.\d+"


def find_towers(model: nn.Module) -> dict[str, nn.Module]:
    """The encoders of a model's towers, each with its `layers`, by the tower's name (`"text"`, `"vision"`).

    Raises:
        ValueError: the model has no such tower.
    """
    towers: dict[str, nn.Module] = {}
    for module in model.modules():
        encoder = getattr(module, "encoder", None)
        modalities = getattr(module, "input_modalities", ())
        known = isinstance(module, PreTrainedModel) and modalities in (("text",), ("image",))
        if known and getattr(encoder, "layers", None):
            towers["text" if modalities == ("text",) else "vision"] = encoder
    attributes = ("self_attn", "layer_norm1")
    if not towers or not all(hasattr(tower.layers[0], name) for tower in towers.values() for name in attributes):
        raise ValueError(
            f"{type(model).__name__} has no CLIP-like text or vision tower to put prompts into; give a CLIPModel, "
            "CLIPTextModel or CLIPVisionModel."
        )
    return towers


class PromptTuner(BaseTuner):
    """Puts the prompts of any method's generators into the encoder layers of a CLIP.

    Made by `get_peft_model(clip, MmAPConfig(...))`. The base is frozen and keeps its keys; each encoder layer's
    `forward` is hooked, and one `PromptContainer` is added to the model as child `mmap`.
    """

    prefix = "mmap_"
    tuner_layer_cls = PromptContainer
    target_module_mapping: dict[str, Any] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check that name and settings fit before anything is changed, then add the adapter."""
        try:
            self._check(model, adapter_name, self.peft_config[adapter_name])
        except ValueError:
            if len(self.peft_config) > 1:  # several adapters: the others go on as if nothing had been tried
                del self.peft_config[adapter_name]
            raise
        kwargs.pop("state_dict", None)  # its keys name the container, never the layers to hook
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check(self, model: nn.Module, adapter_name: str, config: PromptConfig) -> None:
        if adapter_name in RESERVED or not adapter_name or set("./\\") & set(adapter_name):
            raise ValueError(
                f"{adapter_name!r} cannot name an adapter, since names become keys and folders; write one without "
                f"'.' and '/' that is none of {', '.join(RESERVED)}."
            )
        config.check(_shapes(find_towers(model)))

    def _prepare_adapter_config(self, peft_config: PromptConfig, model_config: dict) -> PromptConfig:
        # A regular expression: PEFT would condense a list of 20 layers or more to patterns of its own.
        peft_config.target_modules = peft_config.target_modules or ENCODER_LAYERS
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PromptConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # The container is made here and no earlier: PEFT takes a model that has a tuner layer already for one whose
        # base was frozen before, and would leave the whole base trainable.
        towers = find_towers(self.model)
        if not hasattr(self.model, "mmap"):
            self.model.mmap = PromptContainer(_shapes(towers))
            for encoder in towers.values():
                RoutingHook.attach(encoder, self.model.mmap)
        container = self.model.mmap
        if adapter_name not in container.mmap_generators:
            generator = peft_config.generator_class(peft_config, container.towers)
            weight = target.layer_norm1.weight
            if not any(parameter.is_meta for parameter in generator.parameters()):
                generator = generator.to(weight.device, weight.dtype)
            container.mmap_generators[adapter_name] = generator
        if not isinstance(target.__dict__.get("forward"), PromptedForward):
            for name, encoder in towers.items():
                for index, layer in enumerate(encoder.layers):
                    if layer is target:
                        PromptedForward.attach(layer, container, name, index)

    def unload(self) -> nn.Module:
        """Take all prompts out and return the base, unchanged to the bit."""
        for encoder in find_towers(self.model).values():
            RoutingHook.detach(encoder)
            for layer in encoder.layers:
                if isinstance(layer.__dict__.get("forward"), PromptedForward):
                    PromptedForward.detach(layer)
        del self.model.mmap
        return super().unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Prompts cannot be merged.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Prompts are extra tokens, not a change of the weights, so they cannot be merged into the base; keep the "
            "adapter, or write model.unload() to get the base back."
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """As `merge_and_unload`."""
        self.merge_and_unload()


def _shapes(towers: dict[str, nn.Module]) -> dict[str, TowerShape]:
    def width(layer: nn.Module) -> int:
        norm: torch.Tensor = layer.layer_norm1.weight
        return norm.shape[0]

    # In a fixed order, so that the same seed makes the same prompts whatever the order of the model's children.
    return {name: TowerShape(len(tower.layers), width(tower.layers[0])) for name, tower in sorted(towers.items())}

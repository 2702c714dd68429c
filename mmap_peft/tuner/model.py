"""The PEFT tuner of all prompt methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ..prompts.base import PromptConfig, TowerShape
from . import inputs
from .checked import CheckedTuner
from .layer import PromptedForward
from .routing import PromptContainer, RoutingHook, use_routes


RESERVED = ("base_model", "mmap", "model")
FAMILIES = {  # by the towers' `model_type`, less its ending
    "clip": "CLIP",
    "siglip": "SigLIP",
    "siglip2": "SigLIP 2",
    "metaclip_2": "MetaCLIP 2",
    "clipseg": "CLIPSeg",
}
ENCODER_LAYERS = r"(.*\.)?encoder\.layers\.\d+"


def find_towers(model: nn.Module) -> dict[str, nn.Module]:
    """A model's towers, each with its `encoder.layers`, by their names (`"text"`, `"vision"`).

    Raises:
        ValueError: the model has no such tower.
    """
    towers: dict[str, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module, "encoder"):
            family, _, tower = module.config.model_type.removesuffix("_model").rpartition("_")
            if family in FAMILIES:
                towers[tower] = module
    if not towers:
        raise ValueError(
            f"{type(model).__name__} has no text or vision tower that prompts are known to work with; give a model of "
            f"{', '.join(FAMILIES.values())}, or one of its towers."
        )
    return towers


def encoder_layers(model: nn.Module) -> dict[nn.Module, tuple[str, int]]:
    """Tower and number of each encoder layer of a model."""
    return {
        layer: (tower, index)
        for tower, module in find_towers(model).items()
        for index, layer in enumerate(module.encoder.layers)
    }


class PromptTuner(CheckedTuner):
    """Puts the prompts of any method's generators into the encoder layers of a CLIP.

    Made by `get_peft_model(clip, MmAPConfig(...))`. The base is frozen and keeps its keys; each encoder layer's
    `forward` is hooked, and one `PromptContainer` is added to the model as child `mmap`.
    """

    prefix = "mmap_"
    tuner_layer_cls = PromptContainer
    target_module_mapping: dict[str, Any] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        super().__init__(model, _Configs(configs), adapter_name, **kwargs)

    def _check(self, model: nn.Module, adapter_name: str, config: PromptConfig) -> None:
        taken = adapter_name in RESERVED or hasattr(nn.ModuleDict, adapter_name)
        if taken or not adapter_name or set("./\\") & set(adapter_name):
            raise ValueError(
                f"{adapter_name!r} cannot name an adapter, since names become keys, attributes and folders; write one "
                f"without '.' and '/' that is none of {', '.join(RESERVED)} and no word of torch's, such as 'train'."
            )
        towers = find_towers(model)
        config.check(_shapes(towers))
        widened = config.rides and "vision" in config.towers and towers.get("vision")
        if widened and widened.config.model_type == "siglip2_vision_model":
            raise ValueError(
                f"{type(config).__name__} adds tokens to images, but a {type(widened).__name__} masks images of any "
                "size; give a SigLIP 2 of a fixed resolution, which is a SiglipModel, or use MmAPConfig."
            )
        self._prepare_adapter_config(config, {})
        self._places(model, config)

    def _prepare_adapter_config(self, peft_config: PromptConfig, model_config: dict) -> PromptConfig:
        # A regular expression: PEFT would condense a list of 20 layers or more to patterns of its own.
        peft_config.target_modules = peft_config.target_modules or ENCODER_LAYERS
        return peft_config

    def _places(self, model: nn.Module, config: PromptConfig) -> set[tuple[str, int]]:
        """Tower and number of the encoder layers that a config hooks."""
        layers, places = encoder_layers(model), set()
        for name, module in model.named_modules():
            if not self._check_target_module_exists(config, name):
                continue
            if module not in layers:
                raise ValueError(
                    f"target_modules={config.target_modules!r} matches {name!r}, which is no encoder layer; prompts "
                    f"enter whole layers, so write a regular expression of those, such as {ENCODER_LAYERS!r}."
                )
            if layers[module][0] in config.towers:
                places.add(layers[module])
        return places

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
            self.model.mmap = PromptContainer(target.layer_norm1)
            inputs.attach(towers, self.model.mmap)
            for tower in towers.values():
                RoutingHook.attach(tower.encoder, self.model.mmap)
            pooling = _pooling_layer(towers)
            for layer, place in encoder_layers(self.model).items():  # all, since each is handed the routing
                PromptedForward.attach(layer, self.model.mmap, *place, pools=layer is pooling)
        container = self.model.mmap
        if adapter_name not in container.mmap_generators:
            places = self._places(self.model, peft_config)
            hooked = {tower for tower, _ in places}
            shapes = {tower: shape for tower, shape in _shapes(towers).items() if tower in hooked}
            generator = peft_config.generator_class(peft_config, shapes)
            if peft_config.rides and "text" in shapes and not towers["text"].embeddings.token_embedding.weight.is_meta:
                generator.start_from_words(towers["text"].embeddings.token_embedding)
            if not any(parameter.is_meta for parameter in generator.parameters()):
                generator = generator.to(container.weight.device, container.weight.dtype)
            container.mmap_generators[adapter_name], container.places[adapter_name] = generator, places

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT's way to give each row of a batch an adapter of its own: model(..., adapter_names=["x", "y"]).
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        rows = list(range(len(names)))
        with use_routes(self.model, [() if name == "__base__" else (name,) for name in names], text=rows, vision=rows):
            yield

    def unload(self) -> nn.Module:
        """Take all prompts out and return the base, unchanged to the bit."""
        for tower in find_towers(self.model).values():
            inputs.detach(tower)
            RoutingHook.detach(tower.encoder)
        for layer in encoder_layers(self.model):
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

    def unmerge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """As `merge_and_unload`."""
        self.merge_and_unload()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Adapters are joined, not averaged.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Weighted sums of prompts are no prompts that anything was trained with; to use several adapters at once, "
            "write use_routes(model, (name, other_name))."
        )


def _pooling_layer(towers: dict[str, nn.Module]) -> nn.Module | None:
    """The vision layer of whose output the first token is pooled. SigLIP pools all."""
    tower = towers.get("vision")
    pools = tower is not None and not tower.config.model_type.startswith("siglip")
    return tower.encoder.layers[-1] if pools else None


class _Configs(dict):
    """Settings by adapter. When the first of several active adapters is deleted, `PeftModel` goes on asking for its
    settings; it gets those of the first that is left."""

    deleted: str | None = None

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.deleted = name

    def __missing__(self, name: str) -> PromptConfig:
        if not self or name != self.deleted:
            raise KeyError(name)
        return next(iter(self.values()))


def _shapes(towers: dict[str, nn.Module]) -> dict[str, TowerShape]:
    def width(layer: nn.Module) -> int:
        norm: torch.Tensor = layer.layer_norm1.weight
        return norm.shape[0]

    # In a fixed order, so that the same seed makes the same prompts whatever the order of the model's children.
    return {
        name: TowerShape(len(tower.encoder.layers), width(tower.encoder.layers[0]))
        for name, tower in sorted(towers.items())
    }

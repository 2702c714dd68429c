"""The PEFT tuner of all prompt methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..checking import shortened
from ..prompts.base import PromptConfig, TowerShape
from .attention import PromptAttentionConfig, takes_prompts
from .checked import CheckedTuner
from .container import PromptContainer
from .fitting import check_generator, check_modules_to_save, check_targets, check_text_prompts
from .layer import PromptedLayer
from .routes import use_routes
from .tower import PromptedTower


FAMILIES = {  # by the `model_type` of the towers without its ending
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
    towers = find_towers(model).items()
    return {layer: (name, index) for name, tower in towers for index, layer in enumerate(tower.encoder.layers)}


class PromptTuner(CheckedTuner):
    """PEFT tuner that adds the prompts of any prompt method to the encoder layers of a CLIP.

    Created by `get_peft_model(clip, MmAPConfig(...))`. The base is frozen and keeps its state dict keys. Its towers
    and their encoder layers get hooks, and one `PromptContainer` is added to the model as child `mmap`.
    """

    prefix = "mmap_"
    tuner_layer_cls = PromptContainer
    no_merge = (
        "Prompts are extra tokens, not a change of the weights, so they cannot be merged into the base; keep the "
        "adapter, or write model.unload() to get the base back."
    )
    no_weighted_sum = (
        "A weighted sum of prompts is not a prompt that was trained; to use several adapters at once, write "
        "use_routes(model, (name, other_name))."
    )

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        super().__init__(model, _Configs(configs), adapter_name, **kwargs)

    def _check(self, model: nn.Module, adapter_name: str, config: PromptConfig) -> None:
        towers = find_towers(model)
        if not hasattr(model, "mmap") and takes_prompts(model):
            raise ValueError(
                f"Layers of the {type(model).__name__} have prompts already, of another model that shares them; add "
                "adapters to that model, take its prompts out with unload(), or load this model anew."
            )
        config.check(_shapes(towers))
        widened = config.stays_in_sequence and "vision" in config.towers and towers.get("vision")
        if widened and widened.config.model_type == "siglip2_vision_model":
            raise ValueError(
                f"{type(config).__name__} adds tokens to images, but a {type(widened).__name__} masks images of any "
                "size without added tokens; give a SigLIP 2 of one resolution (a SiglipModel), or use MmAPConfig."
            )
        hooked = (module for tower in towers.values() for module in (tower, tower.encoder, *tower.encoder.layers))
        check_modules_to_save(model, config, hooked)
        check_targets(model, self._prepare_adapter_config(config, {}))
        if "text" in towers:
            check_text_prompts(towers["text"], config)
        layers, given = self._layers(model, config), f"target_modules={shortened(config.target_modules)}"
        fewest = min(len(tower.encoder.layers) for tower in towers.values())
        depths = {
            name: config.tower_settings(name)[1] or (fewest if config.needs_all_towers else len(tower.encoder.layers))
            for name, tower in towers.items()
        }
        prompted = {name for name, index in layers if index < depths[name]}
        if not prompted and config.depth is not None:
            raise ValueError(
                f"{given} matches none of the first depth={config.depth} layers, so no layer gets prompts; "
                f"write a depth above {min(index for _, index in layers)}, since layers are counted from 0, or leave "
                "it out."
            )
        if config.needs_all_towers and len(prompted) < len(towers):
            raise ValueError(
                f"{given}, less exclude_modules={shortened(config.exclude_modules)}, matches "
                f"layers that can get prompts in {len(prompted)} of {len(towers)} towers, but {type(config).__name__} "
                f"puts prompts into the first {fewest} or fewer layers of each; match some of both."
            )
        check_generator(model, adapter_name, config, _prompted_shapes(towers, layers))

    def _prepare_adapter_config(self, peft_config: PromptConfig, model_config: dict) -> PromptConfig:
        # A regular expression, since PEFT would replace a list of 20 or more layers by suffixes.
        peft_config.target_modules = peft_config.target_modules or ENCODER_LAYERS
        return peft_config

    def _layers(self, model: nn.Module, config: PromptConfig) -> frozenset[tuple[str, int]]:
        """Tower and number of the encoder layers that get prompts."""
        layers, matched = encoder_layers(model), set()
        given = f"target_modules={shortened(config.target_modules)}"
        for name, module in model.named_modules():
            if not self._check_target_module_exists(config, name):
                continue
            if module not in layers:
                raise ValueError(
                    f"{given} matches {name!r}, which is no encoder layer; prompts "
                    f"enter whole layers, so write a regular expression of those, such as {ENCODER_LAYERS!r}."
                )
            matched.add(layers[module])
        first, towers = config.first_layer, config.towers
        chosen = frozenset((tower, index) for tower, index in matched if tower in towers and index >= first)
        if not chosen:
            raise ValueError(
                f"{given} matches no layer of the {' or '.join(config.towers)} tower from layer {first} on, which "
                f"{type(config).__name__} puts prompts into; match such layers, or leave it out."
            )
        return chosen

    def _create_and_replace(
        self,
        peft_config: PromptConfig,
        adapter_name: str,
        target: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # The container is made here and no earlier: PEFT takes a model that has a tuner layer already for one whose
        # base was frozen before, and would leave the whole base trainable.
        container = getattr(self.model, "mmap", None)
        if container is not None and adapter_name in container.mmap_generators:
            return  # PEFT calls this for each target module
        towers = find_towers(self.model)
        layers = self._layers(self.model, peft_config)
        shapes = _prompted_shapes(towers, layers)
        generator = peft_config.generator_class(peft_config, shapes)
        if container is None:
            container = self.model.mmap = PromptContainer(target.layer_norm1)
            _add_hooks(towers, container)
        if peft_config.stays_in_sequence and "text" in shapes:
            embedding = towers["text"].embeddings.token_embedding
            if not embedding.weight.is_meta or hasattr(embedding, "_hf_hook"):  # accelerate brings offloaded weights
                generator.start_from_words(embedding)
        if not any(parameter.is_meta for parameter in generator.parameters()):
            device = None if container.weight.is_meta else container.weight.device  # meta: offloaded
            generator = generator.to(device, container.weight.dtype)
        container.mmap_generators[adapter_name], container.layers[adapter_name] = generator, layers
        if peft_config.modules_to_save:
            container.with_modules_to_save.add(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT's way to give each row of a batch an adapter of its own: model(..., adapter_names=["x", "y"]).
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if not names:
            raise ValueError("`adapter_names` is empty; write the name of an adapter for each row of the batch.")
        rows = list(range(len(names)))
        with use_routes(self.model, [() if name == "__base__" else (name,) for name in names], text=rows, vision=rows):
            yield

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().set_adapter(*args, **kwargs)
        if isinstance(self.peft_config, _Configs):  # transformers' own methods make a plain dict
            self.peft_config.stand_in = {}

    def delete_adapter(self, adapter_name: str) -> None:
        active = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        if len(active) > 2 and active[0] == adapter_name and isinstance(self.peft_config, _Configs):
            self.peft_config.stand_in = {adapter_name: active[1]}

    def unload(self) -> nn.Module:
        """Take all prompts out and return the base, unchanged to the bit but for `modules_to_save`, whose trained
        copies stay in it, as with all methods of PEFT."""
        unwrap_modules(self.model, trained=True)
        for handle in self.model.mmap.handles:
            handle.remove()
        for layer in encoder_layers(self.model):
            layer.self_attn.config = layer.self_attn.config.base
        del self.model.mmap
        return super().unload()


def unwrap_modules(model: nn.Module, trained: bool) -> None:
    """Replace PEFT's wrapper of each of `modules_to_save` by the active adapter's trained copy, or by the original."""
    for name, module in reversed(list(model.named_modules())):  # those inside another one first
        if isinstance(module, ModulesToSaveWrapper):
            copy = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            model.set_submodule(name, copy if trained else module.original_module)


def remove_adapters(model: nn.Module) -> None:
    """Take out what PEFT has put into a model before it raised an error."""
    unwrap_modules(model, trained=False)
    for name, module in reversed(list(model.named_modules())):
        base = getattr(module, "base_layer", None)
        if isinstance(module, BaseTunerLayer) and isinstance(base, nn.Module):
            model.set_submodule(name, base)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(name, None)


def _add_hooks(towers: dict[str, nn.Module], container: PromptContainer) -> None:
    # Hooks instead of another `forward` keep what wraps a layer's forward (accelerate's device maps and offloading).
    for name, tower in towers.items():
        around = PromptedTower(container, name)
        container.handles.append(tower.encoder.register_forward_pre_hook(around.enter, with_kwargs=True))
        layers = [(layer, PromptedLayer(tower, name, index)) for index, layer in enumerate(tower.encoder.layers)]
        both: list[tuple[nn.Module, Any]] = [(tower, around), *layers]
        for module, hooks in both:
            container.handles += [
                module.register_forward_pre_hook(hooks.enter, with_kwargs=True),
                # Before other hooks, so that those which record hidden states see the tokens only.
                module.register_forward_hook(hooks.leave, prepend=True, with_kwargs=True),
            ]
        for layer, _ in layers:
            layer.self_attn.config = PromptAttentionConfig(layer.self_attn.config)


class _Configs(dict):
    """Configs by adapter name.

    When the first of three or more active adapters is deleted, `PeftModel` still reads its config until another
    adapter is activated. Until then, it gets the config of the next adapter.
    """

    stand_in: dict[str, str] = {}

    def __missing__(self, name: str) -> PromptConfig:
        if name not in self.stand_in:
            raise KeyError(name)
        return self[self.stand_in[name]]


def _shapes(towers: dict[str, nn.Module]) -> dict[str, TowerShape]:
    # In a fixed order, so that prompts from the same seed do not depend on the order of the model's children.
    return {
        name: TowerShape(len(tower.encoder.layers), tower.config.hidden_size) for name, tower in sorted(towers.items())
    }


def _prompted_shapes(towers: dict[str, nn.Module], layers: Iterable[tuple[str, int]]) -> dict[str, TowerShape]:
    prompted = dict(layers)
    return {tower: shape for tower, shape in _shapes(towers).items() if tower in prompted}

"""Whether the settings of an adapter fit a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ..checking import shortened
from ..prompts.base import PromptConfig, TowerShape
from .layer import start_tokens


RESERVED = ("base_model", "mmap", "model", "tuned")
MOST_PARAMETERS = 10**9  # of one adapter: 4 GB in float32


def check_adapter_name(name: str, model: nn.Module, more: Iterable[str] = ()) -> None:
    """Raise a `ValueError` if no adapter of this model can have this name, or if it is among `more`, names of tensors.

    PEFT finds the tensors of an adapter by its name in theirs, and leaves out those that hold another adapter's.
    """
    parts = {part for path, _ in model.named_parameters() for part in path.split(".")}
    taken = name in RESERVED or hasattr(nn.ModuleDict, name) or name in parts.union(more)
    if taken or not name or set("./\\") & set(name):
        raise ValueError(
            f"{name[:60]!r} cannot name an adapter, since names become keys, attributes and folders; write one "
            f"without '.' and '/' that is none of {', '.join(RESERVED)}, no part of a tensor's name, such as "
            "'weight', and no attribute of an nn.ModuleDict, such as 'train'."
        )


def check_targets(model: nn.Module, config: PeftConfig) -> None:
    """Raise a `ValueError` if `target_modules`, less `exclude_modules`, matches no module of a model."""
    targets, excluded = config.target_modules, getattr(config, "exclude_modules", None)
    if not targets or targets == "all-linear" or getattr(config, "target_parameters", None):
        return  # PEFT chooses them
    if not any(name and check_target_module_exists(config, name) for name, _ in model.named_modules()):
        without = f", less exclude_modules={shortened(excluded)}," if excluded else ""
        raise ValueError(
            f"target_modules={shortened(targets)}{without} matches no module of the {type(model).__name__}; write a "
            "regular expression of whole names of modules, or a list of their last parts."
        )


def check_text_prompts(tower: nn.Module, config: PromptConfig) -> None:
    """Raise a `ValueError` if prompts that replace words do not fit a text tower."""
    positions = tower.config.max_position_embeddings
    most = positions - start_tokens(tower, "text") - 2  # a class name of one token, and the end of the text
    if config.placeholders > most:
        raise ValueError(
            f"num_prompts={config.num_prompts} leaves no place for words in the {positions} positions of the text "
            f"tower; write at most {most}."
        )
    ids, words = getattr(config, "init_ids", None) or (), tower.embeddings.token_embedding.num_embeddings
    if ids and max(ids) >= words:
        raise ValueError(
            f"init_ids={shortened(list(ids))} holds {max(ids)}, but the text tower has {words} tokens; write ids from "
            f"0 to {words - 1}."
        )


def check_generator(model: nn.Module, name: str, config: PromptConfig, shapes: Mapping[str, TowerShape]) -> None:
    """Raise a `ValueError` if the adapter would be too large, or has the name of one of its tensors."""
    with torch.device("meta"):
        parameters = dict(config.generator_class(config, shapes).named_parameters())
    check_adapter_name(name, model, {part for path in parameters for part in path.split(".")})
    size = sum(parameter.numel() for parameter in parameters.values())
    if size > MOST_PARAMETERS:
        settings = ", ".join(
            f"{setting}={getattr(config, setting)}"
            for setting in ("num_prompts", "num_vision_prompts", "num_classes", "token_size")
            if getattr(config, setting, None)
        )
        raise ValueError(f"{settings} makes {size:,} parameters; write numbers that make at most {MOST_PARAMETERS:,}.")


def check_modules_to_save(model: nn.Module, config: PeftConfig, hooked: Iterable[nn.Module] = ()) -> None:
    """Raise a `ValueError` if PEFT cannot copy `modules_to_save`: there are none, or they are or hold adapters, or
    `hooked` modules, whose copies would run the hooks again."""
    hooked = set(hooked)
    for wanted in getattr(config, "modules_to_save", None) or ():
        matched = {name: module for name, module in model.named_modules() if name.endswith(wanted)}  # as PEFT does
        held = next((name for name, module in matched.items() if _holds(module, hooked)), None)
        given = f"modules_to_save={shortened(config.modules_to_save)}"
        if held is not None:
            raise ValueError(
                f"{given} matches {held!r}, which holds encoder layers that prompts enter, or adapters; name modules "
                "outside of the encoders, or single modules inside a layer."
            )
        if not matched or not wanted or "mmap_generators".endswith(wanted) or "mmap".endswith(wanted):
            raise ValueError(
                f"{given} holds {wanted!r}, which is no module of the base; name its modules, such as "
                "'visual_projection'."
            )


def _holds(module: nn.Module, hooked: set[nn.Module]) -> bool:
    return any(part in hooked or _is_container(part) for part in module.modules())


def _is_container(module: Any) -> bool:
    """Whether a module holds all adapters of a model, and is no layer of it."""
    return isinstance(module, BaseTunerLayer) and not isinstance(getattr(module, "base_layer", None), nn.Module)

"""A CLIP with its adapters in its weights."""

from __future__ import annotations

import copy

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def merged(model: nn.Module, used: bool) -> nn.Module:
    """The base of a model in which its active adapter is part of the weights: a copy, if it has adapters.

    Args:
        model (`nn.Module`): a CLIP, or a `PeftModel` of a method that is none of prompts.
        used (`bool`): whether the adapter is to be used; without it the base is returned as it is under the adapter.
    """
    if not isinstance(model, PeftModel):
        return model
    model = copy.deepcopy(model)
    if not used:
        return model.unload()
    try:
        return model.merge_and_unload()
    except NotImplementedError:  # a nonlinearity: its layers stay
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                _rename(layer, model.active_adapter, "tuned")
        return model.get_base_model()


def _rename(layer: BaseTunerLayer, adapter: str, name: str) -> None:
    """Rename an adapter: `global` is a word of Python's, which the code that torch.export writes cannot use."""
    for attribute in layer.adapter_layer_names:
        modules = getattr(layer, attribute)
        modules[name] = modules.pop(adapter)
    layer.set_adapter(name)

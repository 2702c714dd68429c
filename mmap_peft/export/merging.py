"""A CLIP with its adapters in its weights."""

from __future__ import annotations

import copy

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..tuner.model import unwrap_modules


def merged(model: nn.Module, used: bool) -> nn.Module:
    """The base of a model in which its active adapter is part of the weights: a copy, if it has adapters.

    Args:
        model (`nn.Module`): a CLIP, or a `PeftModel` of a method without prompts.
        used (`bool`): whether the adapter is used; if not, the plain base is returned.
    """
    if not isinstance(model, PeftModel):
        return model
    model = copy.deepcopy(model)
    if not used:
        unwrap_modules(model, trained=False)
        return model.unload()
    try:
        return model.merge_and_unload()
    except NotImplementedError:  # bottleneck adapters have a nonlinearity: their layers stay
        pass
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            # torch.export writes code with the adapter's name, and `global` is a keyword of Python.
            for attribute in layer.adapter_layer_names:
                modules = getattr(layer, attribute)
                modules["tuned"] = modules.pop(model.active_adapter)
            layer.set_adapter("tuned")
    return model.get_base_model()

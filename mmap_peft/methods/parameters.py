"""Full fine-tuning and BitFit: they train copies of the base's parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..checking import Pattern, shortened
from ..prompts.method import Method, MethodConfig
from ..tuner.checked import CheckedTuner


class TunedParameters(nn.ParameterDict):
    """One adapter's copies of parameters. `forward` returns them, so that hooks which move parameters run before."""

    __call__ = nn.Module.__call__  # a ParameterDict refuses to be called

    def forward(self) -> dict[str, nn.Parameter]:
        return {name.replace("/", "."): parameter for name, parameter in self.items()}


class ParameterContainer(nn.Module, BaseTunerLayer):
    """Child `tuned` of a model: holds each adapter's copies of parameters. Modules use those of the active adapter.

    Python finds an attribute of an instance before a parameter of the same name. So the copies are set as attributes
    of the modules, and the base's parameters and state dict do not change. They are set when an adapter is activated,
    disabled or deleted. A forward pass only checks them, so threads may share a model.
    """

    adapter_layer_names = ("tuned_parameters",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tuned_parameters = nn.ModuleDict()
        self.places: dict[str, tuple[nn.Module, str]] = {}  # by full name: the module, and the name in it
        self._active_adapter: list[str] = []
        self._base = (model,)  # a tuple: as a child it would be saved a second time
        # Copies may be replaced (by loading, by moving), and a CLIP's towers may be run without the CLIP.
        self.hooks = [module.register_forward_pre_hook(self.refresh) for module in (model, *model.children())]

    def get_base_layer(self) -> nn.Module:
        """The base. It has no `weight`, so PEFT does not move all copies to one device and dtype."""
        return self._base[0]

    def add(self, adapter_name: str, places: dict[str, tuple[nn.Module, str]]) -> None:
        """Add an adapter that starts as a copy of the parameters at these places."""
        # A dot would make a key's last part look like the parameter's name in a module.
        copies = {
            name.replace(".", "/"): nn.Parameter(module._parameters[attribute].detach().clone())
            for name, (module, attribute) in places.items()
        }
        self.tuned_parameters[adapter_name] = TunedParameters(copies)
        self.places.update(places)

    def copies(self, adapter_names: Sequence[str]) -> dict[str, nn.Parameter]:
        """The copies, by name, of the one adapter of this method among these; none if there is no such adapter."""
        names = [name for name in adapter_names if name in self.tuned_parameters]
        if len(names) > 1:
            raise ValueError(
                f"Adapters {', '.join(names)} would each take the place of the same parameters; activate one of them."
            )
        return self.tuned_parameters[names[0]]() if names else {}

    def refresh(self, *_: Any) -> None:
        """Make the modules use the active adapter's parameters, or the base's. Sets only what has changed."""
        copies = {} if self.disable_adapters else self.copies(self.active_adapters)
        for name, (module, attribute) in self.places.items():
            if name not in copies:
                module.__dict__.pop(attribute, None)
            elif module.__dict__.get(attribute) is not copies[name]:
                module.__dict__[attribute] = copies[name]

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.copies(names)  # raises for several
        super().set_adapter(names, inference_mode)
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.refresh()  # before the places are forgotten
        used = {name for adapter in self.tuned_parameters.values() for name in adapter()}
        self.places = {name: place for name, place in self.places.items() if name in used}


class ParameterTuner(CheckedTuner):
    """PEFT tuner that trains copies of a base's parameters, created by `get_peft_model`.

    The copies are the base's child `tuned`. The base is frozen, and keeps its state dict keys and values.
    """

    prefix = "tuned_"
    tuner_layer_cls = ParameterContainer
    no_rows = "All rows of a batch use the same tuned parameters, so rows cannot have adapters of their own."
    no_merge = "Merged parameters cannot be unmerged; write model.merge_and_unload(), or keep the adapter."
    no_weighted_sum = (
        "A weighted sum of tuned parameters is not implemented; use one adapter at a time, or average the saved "
        "tensors of several and load those."
    )

    def _check(self, model: nn.Module, adapter_name: str, config: ParameterConfig) -> dict[str, tuple[nn.Module, str]]:
        """The modules and names of the tuned parameters, as in `ParameterContainer.places`."""
        adapters = tuple(
            f"{name}.{attribute}.".lstrip(".")
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
            for attribute in module.adapter_layer_names
        )
        places = {}
        for name, parameter in model.named_parameters():
            if name.startswith(adapters) or not re.fullmatch(config.parameters, name):
                continue
            if not torch.is_floating_point(parameter):
                raise ValueError(
                    f"{name!r} is quantised, and whole numbers have no gradient; give a base in float, or a method "
                    "that leaves it frozen."
                )
            path, _, attribute = name.rpartition(".")
            places[name] = model.get_submodule(path), attribute
        if not places:
            raise ValueError(
                f"parameters={shortened(config.parameters)} matches none of the base's parameters; write a "
                "regular expression of whole names, such as '.*bias'."
            )
        return places

    def _create_and_replace(self, config: ParameterConfig, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # The container is made here and no earlier: if a model has a tuner layer already, PEFT assumes that its base
        # is frozen, and would leave the whole base trainable.
        if not hasattr(self.model, "tuned"):
            self.model.tuned = ParameterContainer(self.model)
        if adapter_name not in self.model.tuned.tuned_parameters:  # PEFT calls this for each module
            self.model.tuned.add(adapter_name, self._check(self.model, adapter_name, config))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Do nothing: a copy keeps the dtype of its parameter."""

    def unload(self) -> nn.Module:
        """Remove the adapters and return the base, which is equal to the original to the bit."""
        if hasattr(self.model, "tuned"):
            self.model.tuned.enable_adapters(False)
            for hook in self.model.tuned.hooks:
                hook.remove()
            del self.model.tuned
        return super().unload()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Copy one adapter's parameters into the base and return it. As in PEFT, but `progressbar` has no effect.

        Raises:
            ValueError: there is no such adapter, there are several, or `safe_merge` finds values that are not finite.
        """
        container = getattr(self.model, "tuned", None)
        if container is None:
            return self.unload()
        tuned = container.tuned_parameters
        names = (
            [name for name in container.active_adapters if name in tuned] if adapter_names is None else adapter_names
        )
        for name in names:
            if name not in tuned:
                raise ValueError(f"There is no adapter {name!r} to merge; write one of {', '.join(tuned)}.")
        copies = container.copies(names)
        if safe_merge and not all(parameter.isfinite().all() for parameter in copies.values()):
            raise ValueError(f"Adapter {names[0]!r} holds numbers that are not finite; load it again, or train it.")
        with torch.no_grad():
            for name, parameter in copies.items():
                module, attribute = container.places[name]
                module._parameters[attribute].copy_(parameter)
        return self.unload()


@dataclass
class ParameterConfig(MethodConfig):
    """Settings that full fine-tuning and BitFit share.

    Args:
        parameters (`str`): regular expression of the full names of the base's parameters that are tuned.
    """

    target_modules = ".*"  # PEFT asks for it; `parameters` says what is tuned
    tuner_class = ParameterTuner

    parameters: Pattern = ".*"


@dataclass
class FullFineTuningConfig(ParameterConfig):
    r"""Settings of full fine-tuning: all of $\theta$ trains, starting from its pretrained value.

    These are all parameters of the model: both towers with their embeddings, both projections and `logit_scale`. The
    frozen base stays in memory with its tuned copy, so weights take twice the memory, and an adapter's file is as
    large as the base's.

    Args:
        parameters (`str`): as for `ParameterConfig`; `r"vision_model\..*"` tunes only the vision tower.
    """

    method = Method(
        "FULL_FINE_TUNING",
        "Full fine-tuning",
        1e-5,
        "Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022",
    )


@dataclass
class BitFitConfig(ParameterConfig):
    r"""Settings of BitFit: in $W x + b$ and $g \odot z + b$, only $b$ trains (section 3 of the paper).

    These are all biases of both towers: of queries, keys, values and attention's output, of both layers of the MLP,
    and of all layer norms. Projections and the patch embedding have none.

    Args:
        parameters (`str`): a regular expression of fewer biases, such as `r".*\.(q_proj|fc1)\.bias"`, which are the
            paper's subset of queries and the MLP's first layer.
    """

    method = Method(
        "BITFIT",
        "BitFit",
        1e-3,
        "Ben Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked "
        "Language-models, ACL 2022",
    )

    parameters: Pattern = r"(.*\.)?(in_proj_)?bias"

"""Full fine-tuning and BitFit: copies of the base's own parameters train in their place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..registration import MethodPeftType
from ..tuner.checked import CheckedTuner


@dataclass
class ParameterConfig(PeftConfig):
    """Settings that full fine-tuning and BitFit share.

    Args:
        parameters (`str`): regular expression that matches the whole names of the base's parameters that are tuned.
    """

    target_modules: ClassVar[str] = ".*"  # PEFT asks for it; `parameters` says what is tuned

    parameters: str = field(default=".*", metadata={"help": "Regular expression of the names of what is tuned."})


@dataclass
class FullFineTuningConfig(ParameterConfig):
    r"""Settings of full fine-tuning: all of $\theta$ trains, from its pretrained value on.

    That is every parameter of the model: both towers with their embeddings, both projections and `logit_scale`. The
    frozen base stays beside its tuned copy, so that weights take twice the memory, and an adapter's file is as large
    as the base's.

    Args:
        parameters (`str`): `r"vision_model\..*"` tunes the vision tower alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodPeftType.FULL_FINE_TUNING


@dataclass
class BitFitConfig(ParameterConfig):
    r"""Settings of BitFit: of $W x + b$ and $g \odot z + b$ only the $b$ train.

    These are all biases of both towers: of queries, keys, values and attention's output, of both layers of the MLP,
    and of all layer norms. Projections and the patch embedding have none.

    Source: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models", ACL 2022, section 3.

    Args:
        parameters (`str`): a regular expression of fewer biases, such as `r".*\.(q_proj|fc1)\.bias"`, which are the
            paper's subset of queries and the MLP's first layer.
    """

    parameters: str = field(
        default=r"(.*\.)?(in_proj_)?bias", metadata={"help": "Regular expression of the names of what is tuned."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodPeftType.BITFIT


Place = tuple[nn.Module, str]  # where a parameter is: its module, and its name there


class ParameterContainer(nn.Module, BaseTunerLayer):
    """Child `tuned` of a model: holds each adapter's copies of parameters; modules use the active one's.

    An attribute of an instance goes before a parameter of the same name. So the copies are set as attributes of the
    modules, whose parameters, and with them the base's state, stay what they were.

    Args:
        model (`nn.Module`): the base.
    """

    adapter_layer_names = ("tuned_parameters",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tuned_parameters = nn.ModuleDict()
        self.places: dict[str, Place] = {}
        self._active_adapter = []
        self._base = (model,)  # a tuple: as a child it would be saved a second time
        # Parameters may be replaced (by loading, by moving), and a CLIP's towers may be run without the CLIP.
        self._hooks = [module.register_forward_pre_hook(self.refresh) for module in (model, *model.children())]

    def get_base_layer(self) -> nn.Module:
        """The base, which has no `weight` whose device and type all copies would have to take."""
        return self._base[0]

    def add(self, adapter_name: str, places: dict[str, Place]) -> None:
        """An adapter that starts as a copy of these parameters, given by their names."""
        # A dot would make a key's last part look like the parameter's name in a module.
        self.tuned_parameters[adapter_name] = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(module._parameters[own].detach().clone())
             for name, (module, own) in places.items()}
        )  # fmt: skip
        self.places.update(places)

    @property
    def current(self) -> dict[str, nn.Parameter]:
        """The active adapter's parameters, by the names of those whose place they take."""
        if self.disable_adapters or not self.active_adapters:
            return {}
        copies = self.tuned_parameters[self.active_adapters[0]]
        return {name.replace("/", "."): parameter for name, parameter in copies.items()}

    def refresh(self, *_: Any) -> None:
        """Put the current parameters before the base's, and take those of others away."""
        current = self.current
        for name, (module, own) in self.places.items():
            if name in current:
                module.__dict__[own] = current[name]
            else:
                module.__dict__.pop(own, None)

    def detach(self) -> None:
        """Leave the base as it was."""
        for module, own in self.places.values():
            module.__dict__.pop(own, None)
        for hook in self._hooks:
            hook.remove()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """As PEFT's, for one adapter at a time.

        Raises:
            ValueError: more than one.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"Adapters {', '.join(names)} would each take the place of the base's parameters; activate one of "
                "them."
            )
        super().set_adapter(names, inference_mode)
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.refresh()

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "A tuned parameter replaces the base's, and cannot be taken out again; write model.merge_and_unload(), or "
            "keep the adapter."
        )


class ParameterTuner(CheckedTuner):
    """Lets an adapter's copies of parameters take the place of the base's.

    Made by `get_peft_model(clip, FullFineTuningConfig())` or `BitFitConfig()`. The base is frozen and keeps its keys
    and values; one `ParameterContainer` is added to it as child `tuned`.
    """

    prefix = "tuned_"
    tuner_layer_cls = ParameterContainer
    target_module_mapping: dict[str, Any] = {}

    def _check(self, model: nn.Module, adapter_name: str, config: ParameterConfig) -> None:
        self._places(config)

    def _places(self, config: ParameterConfig) -> dict[str, Place]:
        places = {
            name: (self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name, _ in self.model.named_parameters()
            if not name.startswith("tuned.") and re.fullmatch(config.parameters, name)
        }
        if not places:
            raise ValueError(
                f"parameters={config.parameters!r} matches none of the base's parameters; write a regular expression "
                "of whole names, such as '.*bias'."
            )
        for name, (module, own) in places.items():
            if not torch.is_floating_point(module._parameters[own]):
                raise ValueError(
                    f"{name!r} is quantised, and whole numbers have no gradient; give a base in float, or a method "
                    "that leaves it frozen."
                )
        return places

    def _prepare_adapter_config(self, peft_config: ParameterConfig, model_config: dict) -> ParameterConfig:
        return peft_config

    def _create_and_replace(self, peft_config: ParameterConfig, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # The container is made here and no earlier: PEFT takes a model that has a tuner layer already for one whose
        # base was frozen before, and would leave the whole base trainable.
        if not hasattr(self.model, "tuned"):
            self.model.tuned = ParameterContainer(self.model)
        if adapter_name not in self.model.tuned.tuned_parameters:
            self.model.tuned.add(adapter_name, self._places(peft_config))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """What takes a parameter's place must have its type."""

    def unload(self) -> nn.Module:
        """Take the adapters out and return the base, unchanged to the bit."""
        self.model.tuned.detach()
        del self.model.tuned
        return super().unload()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the base with one adapter's parameters for its own: the one that is named, or the active one."""
        container = self.model.tuned
        if adapter_names:
            container.set_adapter(adapter_names)
        for name, parameter in container.current.items():
            module, own = container.places[name]
            module._parameters[own].data.copy_(parameter)
        return self.unload()

"""Full fine-tuning and BitFit: copies of the base's own parameters train in their place."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..prompts.method import Method
from ..tuner.checked import CheckedTuner
from .parameter_container import ParameterContainer, Place


@dataclass
class ParameterConfig(PeftConfig):
    """Settings that full fine-tuning and BitFit share.

    Args:
        parameters (`str`): regular expression that matches the whole names of the base's parameters that are tuned.
    """

    target_modules: ClassVar[str] = ".*"  # PEFT asks for it; `parameters` says what is tuned
    method: ClassVar[Method]
    tuner_class: ClassVar[type[ParameterTuner]]

    parameters: str = field(default=".*", metadata={"help": "Regular expression of the names of what is tuned."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method.peft_type


@dataclass
class FullFineTuningConfig(ParameterConfig):
    r"""Settings of full fine-tuning: all of $\theta$ trains, from its pretrained value on.

    That is every parameter of the model: both towers with their embeddings, both projections and `logit_scale`. The
    frozen base stays beside its tuned copy, so that weights take twice the memory, and an adapter's file is as large
    as the base's.

    Args:
        parameters (`str`): `r"vision_model\..*"` tunes the vision tower alone.
    """

    method: ClassVar[Method] = Method(
        "FULL_FINE_TUNING",
        "Full fine-tuning",
        1e-5,
        "Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022",
    )


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

    method: ClassVar[Method] = Method(
        "BITFIT",
        "BitFit",
        1e-3,
        "Ben Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked "
        "Language-models, ACL 2022",
    )

    parameters: str = field(
        default=r"(.*\.)?(in_proj_)?bias", metadata={"help": "Regular expression of the names of what is tuned."}
    )


class ParameterTuner(CheckedTuner):
    """Lets an adapter's copies of parameters take the place of the base's.

    Made by `get_peft_model(clip, FullFineTuningConfig())` or `BitFitConfig()`. The base is frozen and keeps its keys
    and values; one `ParameterContainer` is added to it as child `tuned`.
    """

    prefix = "tuned_"
    tuner_layer_cls = ParameterContainer
    target_module_mapping: dict[str, Any] = {}
    no_rows = "All rows of a batch use the same tuned parameters, so rows cannot have adapters of their own."
    no_weighted_sum = (
        "A weighted sum of tuned parameters is not implemented; use one adapter at a time, or average the saved "
        "tensors of several and load those."
    )

    def _check(self, model: nn.Module, adapter_name: str, config: ParameterConfig) -> None:
        self._places(config)

    def _places(self, config: ParameterConfig) -> dict[str, Place]:
        adapters = tuple(
            f"{name}.{attribute}.".lstrip(".")
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer)
            for attribute in module.adapter_layer_names
        )
        places = {
            name: (self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name, _ in self.model.named_parameters()
            if not name.startswith(adapters) and re.fullmatch(config.parameters, name)
        }
        if not places:
            raise ValueError(
                f"parameters={config.parameters!r} matches none of the base's parameters; write a regular expression "
                "of whole names, such as '.*bias'."
            )
        for name, (module, attribute) in places.items():
            if not torch.is_floating_point(module._parameters[attribute]):
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
        if hasattr(self.model, "tuned"):
            self.model.tuned.detach()
            del self.model.tuned
        return super().unload()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the base with one adapter's parameters for its own: the one that is named, or the active one.

        Args:
            progressbar (`bool`): has no effect, since merging takes one step.
            safe_merge (`bool`): whether to refuse parameters that are not finite.
            adapter_names (`list[str]`, *optional*): the adapter's name. `None`: the active one.

        Raises:
            ValueError: there is no such adapter, there are several, or its parameters are not finite.
        """
        container = getattr(self.model, "tuned", None)
        if container is None:
            return self.unload()
        active = [name for name in container.active_adapters if name in container.tuned_parameters]
        names = active if adapter_names is None else adapter_names
        container.check_single(names)
        for adapter in names:
            if adapter not in container.tuned_parameters:
                raise ValueError(
                    f"There is no adapter {adapter!r} to merge; write one of {', '.join(container.tuned_parameters)}."
                )
            copies = container.copies(adapter)
            if safe_merge and not all(parameter.isfinite().all() for parameter in copies.values()):
                raise ValueError(f"Adapter {adapter!r} holds numbers that are not finite; load it again, or train it.")
            with torch.no_grad():
                for name, parameter in copies.items():
                    module, attribute = container.places[name]
                    module._parameters[attribute].copy_(parameter)
        return self.unload()


ParameterConfig.tuner_class = ParameterTuner

"""The adapters of a classifier that PEFT keeps in its model: those of PEFT's methods, and prompts.

PEFT writes an adapter's name into the names of tensors, takes it out of them by searching for it, and makes it the key
of a `ModuleDict`. So an adapter called `source`, like a tensor, could be saved but not loaded. Inside the model, the
adapter of a task called `art` is therefore `<art>`, which is part of no other name.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils.modeling import align_module_device
from peft import LNTuningConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from ..checking import LONGEST, shortened
from ..methods.pooled import PooledConfig
from ..prompts.base import PromptConfig, PromptGenerator
from ..prompts.method import MethodConfig
from ..registration import check_peft_type
from ..tuner.assemble import AdapterPrompts, Route
from ..tuner.container import PromptContainer, bracketed, plain_name
from ..tuner.fitting import check_modules_to_save, check_targets
from ..tuner.model import remove_adapters, unwrap_modules
from .adapters import GLOBAL, AdapterSet, ClassWeights, TextFeatures, feature_size, new_parameters
from .overlap import Overlap
from .pooled_adapters import PooledSet
from .task_probes import TaskProbes


_OF_PEFT = {field.name for field in dataclasses.fields(PeftConfig)}
# In names of parameters, of which BitFit's and those of full fine-tuning have slashes for dots.
_NOT_OF_TEXTS = re.compile(r"(^|[./])(vision_model|visual_projection|logit_scale|logit_bias)([./]|$)")


class PeftSet(AdapterSet):
    """One adapter of a PEFT method for all tasks, since adapters of most methods cannot be combined."""

    def __init__(self, clip: PreTrainedModel, config: PeftConfig, seed: int) -> None:
        super().__init__(clip, config)
        self._disabled = Overlap()
        self._wrap(clip, [GLOBAL], seed)

    def _wrap(self, clip: PreTrainedModel, names: Sequence[str], seed: int) -> None:
        with new_parameters(seed):
            self.model = get_peft_model(clip, copy.deepcopy(self.config), adapter_name=bracketed(names[0]))
            for name in names[1:]:
                self.model.add_adapter(bracketed(name), copy.deepcopy(self.config))

    @property
    def clip(self) -> PreTrainedModel:
        return self.model.get_base_model()

    @property
    def names(self) -> list[str]:
        return list(map(plain_name, self.model.peft_config))

    def config_of(self, adapter: str) -> PeftConfig:
        return self.model.peft_config[bracketed(adapter)]

    @property
    def enabled(self) -> bool:
        layers = (module for module in self.clip.modules() if isinstance(module, BaseTunerLayer))
        return not next(layers).disable_adapters

    def _disable(self, undo: ExitStack) -> None:
        # PEFT lets the active adapter train again, whatever was set before.
        for parameter in self.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
        undo.enter_context(self.model.disable_adapter())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self._disabled.block(self._disable):
            yield

    def first_route(self, task_adapter: str) -> Route:
        return (GLOBAL,)

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        part = f".{bracketed(adapter)}."
        named = ((f"{name}.", parameter) for name, parameter in self.clip.named_parameters())
        return {name.replace(part, ".")[:-1]: tensor for name, tensor in named if part in name}

    def state_of(self, adapter: str) -> dict[str, torch.Tensor]:
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if bracketed(adapter) in name.split(".") and any(each.is_meta for each in module.parameters(False)):
                    stack.enter_context(align_module_device(module, "cpu"))  # it is offloaded
            return get_peft_model_state_dict(self.model, adapter_name=bracketed(adapter), save_embedding_layers=False)

    def load_state(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.model, dict(tensors), adapter_name=bracketed(adapter))

    def reset(self, names: Sequence[str], seed: int) -> None:
        training = self.model.training
        self._wrap(self.unload(), names, seed)
        self.model.train(training)
        self.train_only(names)

    def unload(self) -> PreTrainedModel:
        unwrap_modules(self.clip, trained=False)
        return self.model.unload()

    def text_parameters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        of_adapters = {id(parameter) for name in self.names for parameter in self.parameters_of(name).values()}
        named = list(self.clip.named_parameters(remove_duplicate=False))  # a method may share some between towers
        parameters = dict.fromkeys(parameter for _, parameter in named)
        of_texts = {id(parameter) for name, parameter in named if not _NOT_OF_TEXTS.search(name)}
        frozen = [parameter for parameter in parameters if id(parameter) not in of_adapters]
        return frozen, [parameter for parameter in parameters if id(parameter) in of_adapters & of_texts]


class PromptSet(PeftSet):
    """Adapters that are prompts; a task can use those of several adapters at once: of its group and its own.

    If the config says `probe`, the own adapter of each task has a `TextProbe`, too.
    """

    def __init__(self, clip: PreTrainedModel, config: PromptConfig, seed: int) -> None:
        super().__init__(clip, config, seed)
        self.task_probes = TaskProbes(config.probe_scale if config.probe else None, feature_size(clip))

    @property
    def container(self) -> PromptContainer:
        return self.clip.mmap

    disabled = AdapterSet.disabled  # an empty route disables prompts

    @property
    def names(self) -> list[str]:
        return list(map(plain_name, self.container.mmap_generators))

    def generator(self, adapter: str) -> PromptGenerator:
        """The module that computes the prompts of an adapter."""
        return self.container.mmap_generators[bracketed(adapter)]

    def prompts_of(self, adapter: str) -> AdapterPrompts:
        """The prompts of one adapter for all towers that it has prompts for."""
        return self.container.adapter_prompts(bracketed(adapter), list(self.generator(adapter).depths))

    def weights_from_texts(self, route: Route) -> bool:
        return not route or not self.config.probe

    def class_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        return self.task_probes.parameters_of(adapter)

    def takes_other_classes(self, route: Route) -> bool:
        return not route or getattr(self.config, "num_classes", None) is None  # else each class has prompts of its own

    def add(self, name: str, seed: int) -> None:
        """Add an adapter with new parameters."""
        with new_parameters(seed):
            self.model.add_adapter(bracketed(name), copy.deepcopy(self.config))

    def enter(
        self, adapter: str, classes: int, text_features: Callable[[], torch.Tensor], seed: int | None = None
    ) -> None:
        self.task_probes.class_counts[adapter] = classes
        self._add_probes([adapter] if adapter in self.names else [])

    def reset(self, names: Sequence[str], seed: int) -> None:
        self.task_probes.clear()
        super().reset(names, seed)
        self._add_probes(names)

    def _add_probes(self, names: Sequence[str]) -> None:
        self.task_probes.add(names, next(self.generator(self.names[0]).parameters()).device)

    def check_routes(self, routes: Mapping[str, Route]) -> None:
        self.task_probes.check(routes)

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        return {**dict(self.generator(adapter).named_parameters()), **self.task_probes.parameters_of(adapter)}

    def state_of(self, adapter: str) -> dict[str, torch.Tensor]:
        probe = {name: tensor.detach() for name, tensor in self.task_probes.parameters_of(adapter).items()}
        return {**super().state_of(adapter), **probe}

    def needed_state(self, adapter: str, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        prompts = super().state_of(adapter if adapter in self.names else self.names[0])
        return {**prompts, **self.task_probes.needed(adapter)}

    @torch.no_grad()
    def load_state(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        probe = self.task_probes.parameters_of(adapter)
        super().load_state(adapter, {name: tensor for name, tensor in tensors.items() if name not in probe})
        for name, parameter in probe.items():
            parameter.copy_(tensors[name])

    def class_weights(self, routes: Sequence[Route], text_features: TextFeatures) -> ClassWeights:
        if not self.config.probe or not any(routes) or not self.enabled:
            return super().class_weights(routes, text_features)
        return self.task_probes.class_weights(routes, text_features())

    def text_parameters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        # Not by the adapters' names: another thread may be about to add one.
        generators = [part for part in list(self.container.mmap_generators.values()) if "text" in part.depths]
        prompts = [tensor for part in generators for tensor in part.parameters()]
        parts = (module for _, module in self.clip.named_modules(memo={self.container}))
        frozen = dict.fromkeys(tensor for part in parts for tensor in part._parameters.values() if tensor is not None)
        return list(frozen), prompts


def make_adapters(clip: PreTrainedModel, config: PeftConfig | None, seed: int) -> AdapterSet:
    """The adapters of a method, added to a CLIP; with `None`, no adapters.

    Raises:
        ValueError: the method cannot be trained, or the config does not fit the model or has `modules_to_save` with
            prompts.
    """
    if config is None:
        return AdapterSet(clip)
    check_peft_type(config.peft_type)
    if isinstance(config, PooledConfig):
        return PooledSet(clip, config, seed)
    if not isinstance(config, PromptConfig):
        if any(parameter.is_meta for parameter in clip.parameters()):
            raise ValueError(
                f"The {type(clip).__name__} is offloaded, so {type(config).__name__} has no weights to start from; "
                "make the classifier first, and offload it then."
            )
        return _fitted(PeftSet, clip, config, seed)
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save={config.modules_to_save} is not possible with prompts of many tasks, since only one "
            "adapter's copy of a module can run in a batch; leave it out, or use get_peft_model for a single adapter."
        )
    return _fitted(PromptSet, clip, config, seed)


def _fitted(kind: type[PeftSet], clip: PreTrainedModel, config: PeftConfig, seed: int) -> PeftSet:
    """Adapters in a CLIP. If PEFT cannot put them there, the CLIP is left as it was, and a `ValueError` says why."""
    try:
        if not isinstance(config, MethodConfig):  # those of this library are checked by their tuner
            targets = []
            if config.target_modules is not None:
                targets = [part for name, part in clip.named_modules() if check_target_module_exists(config, name)]
            check_modules_to_save(clip, config, targets)
            check_targets(clip, config)
            if isinstance(config, LNTuningConfig) and any(list(part.children()) for part in targets):
                raise ValueError(
                    f"target_modules={shortened(config.target_modules)} matches modules that hold others, but "
                    "LN-tuning copies single layers; write ln_tuning_config() for all layer norms."
                )
        return kind(clip, config, seed)
    except MemoryError:
        raise
    except Exception as error:
        remove_adapters(clip)
        reason = " ".join(str(error).split())
        names = [field.name for field in dataclasses.fields(config) if "_" in field.name]
        if type(error) is ValueError and len(reason) <= LONGEST and any(name in reason for name in names):
            raise
        changed = (
            (each.name, getattr(config, each.name)) for each in dataclasses.fields(config) if each.name not in _OF_PEFT
        )
        given = ", ".join(f"{name}={shortened(value)}" for name, value in changed if value not in (None, False))
        reason = reason[:150].rstrip(".") or type(error).__name__
        raise ValueError(
            f"{type(config).__name__} does not fit the {type(clip).__name__}: {reason}. Change one of its settings, "
            f"{given[:200]}."
        ) from error

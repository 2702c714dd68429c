"""The adapters of a classifier: one interface for prompts, PEFT's methods, linear probes, and none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils.modeling import align_module_device
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..methods.linear_probe import LinearProbeConfig, start_probe
from ..prompts.base import PromptConfig
from ..tuner.assemble import AdapterPrompts, Prompts, Route
from ..tuner.container import PromptContainer
from ..tuner.model import unwrap_modules
from .overlap import Overlap


GLOBAL = "global"  # the adapter that all tasks share before they are grouped

TextFeatures = Callable[[], Sequence[torch.Tensor]]  # returns the unit text features of each task's classes
ClassWeights = tuple[torch.Tensor, torch.Tensor | float]  # (classes of all tasks, dim), and (classes) or 0


class AdapterSet(nn.Module):
    """The adapters of a classifier, and how its model uses them. This one has none: zero-shot.

    Args:
        clip (`PreTrainedModel`): the base, which is frozen.
        config (`PeftConfig`, *optional*): settings of the adapters.

    Attributes:
        model (`nn.Module`): the base, or the `PeftModel` around it.
    """

    def __init__(self, clip: PreTrainedModel, config: PeftConfig | None = None) -> None:
        super().__init__()
        self.config, self.model = copy.deepcopy(config), clip

    @property
    def clip(self) -> PreTrainedModel:
        """The base itself."""
        return self.model

    @property
    def names(self) -> list[str]:
        """Names of the adapters."""
        return []

    @property
    def container(self) -> PromptContainer | None:
        """The container of the adapters if they are prompts, which tasks can combine; `None` if they are not."""
        return None

    @property
    def enabled(self) -> bool:
        """Whether adapters are used: not inside PEFT's `disable_adapter()`."""
        return True

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the `with` block the model is the plain base; for prompts, an empty route has this effect."""
        yield

    def first_route(self, task_adapter: str) -> Route:
        """The route of a task before tasks are grouped; `task_adapter` is the name of the task's own adapter."""
        return ()

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by name."""
        return {}

    def state_of(self, adapter: str) -> dict[str, torch.Tensor]:
        """The tensors of an adapter's file, by their names there."""
        return {name: parameter.detach() for name, parameter in self.parameters_of(adapter).items()}

    @torch.no_grad()
    def load_state(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state_of`."""
        for name, parameter in self.parameters_of(adapter).items():
            parameter.copy_(tensors[name])

    def reset(self, names: Sequence[str], seed: int) -> None:
        """Replace all adapters by new ones with these names; all of them train."""

    def train_only(self, names: Sequence[str]) -> None:
        """Let exactly these adapters train."""
        for name in self.names:
            for parameter in self.parameters_of(name).values():
                parameter.requires_grad_(name in names)

    def unload(self) -> PreTrainedModel:
        """Take all adapters out and return the base as it was."""
        return self.clip

    def prompts(
        self,
        tower: str,
        routes: Sequence[Route],
        given: Mapping[str, AdapterPrompts] | None = None,
        **rows: torch.Tensor,
    ) -> Prompts | None:
        """The prompts of a pass through a tower, or `None`; routes may name `given`, `rows` are as in `Routing`."""
        if self.container is None or tower not in self.config.towers:
            return None
        routing = self.container.routing(routes, given or (), pooled=True, **rows)
        return self.container.prompts([tower], routing, given)

    def class_weights(self, routes: Sequence[Route], text_features: TextFeatures) -> ClassWeights:
        """The linear classifier of unit image features: weight and bias for the classes of tasks with these routes."""
        return torch.cat(list(text_features())), 0.0

    def text_parameters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The parameters that text features depend on: those of the frozen base, and those of adapters."""
        return list(self.clip.parameters()), []


class ProbeSet(AdapterSet):
    """A linear probe for each task, on the frozen image features."""

    def __init__(self, clip: PreTrainedModel, config: LinearProbeConfig) -> None:
        super().__init__(clip, config)
        self.probes = nn.ModuleList()
        self._names: list[str] = []

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def first_route(self, task_adapter: str) -> Route:
        return (task_adapter,)

    def probe(self, name: str) -> nn.Linear:
        """The probe of one task."""
        return self.probes[self._names.index(name)]

    def add(self, name: str, features: torch.Tensor) -> None:
        """Add a probe that is initialized with a task's unit text features, (classes, dim)."""
        self.probes.append(start_probe(features))
        self._names.append(name)

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        return dict(self.probe(adapter).named_parameters())

    def reset(self, names: Sequence[str], seed: int) -> None:
        """Remove all probes; `add` makes new ones, from text features."""
        self.probes, self._names = nn.ModuleList(), []

    def class_weights(self, routes: Sequence[Route], text_features: TextFeatures) -> ClassWeights:
        if not all(routes):  # zero-shot
            return super().class_weights(routes, text_features)
        probes = [self.probe(name) for (name,) in routes]
        return torch.cat([probe.weight for probe in probes]), torch.cat([probe.bias for probe in probes])


class PeftSet(AdapterSet):
    """One adapter of a PEFT method for all tasks, since adapters of most methods cannot be combined."""

    def __init__(self, clip: PreTrainedModel, config: PeftConfig, seed: int) -> None:
        super().__init__(clip, config)
        self._disabled = Overlap()
        self._wrap(clip, [GLOBAL], seed)

    def _wrap(self, clip: PreTrainedModel, names: Sequence[str], seed: int) -> None:
        with _new_parameters(seed):
            self.model = get_peft_model(clip, copy.deepcopy(self.config), adapter_name=names[0])
            for name in names[1:]:
                self.model.add_adapter(name, copy.deepcopy(self.config))

    @property
    def clip(self) -> PreTrainedModel:
        return self.model.get_base_model()

    @property
    def names(self) -> list[str]:
        return list(self.model.peft_config)

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
        named = ((f"{name}.", parameter) for name, parameter in self.clip.named_parameters())
        return {name.replace(f".{adapter}.", ".")[:-1]: tensor for name, tensor in named if f".{adapter}." in name}

    def state_of(self, adapter: str) -> dict[str, torch.Tensor]:
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if adapter in name.split(".") and any(parameter.is_meta for parameter in module.parameters(False)):
                    stack.enter_context(align_module_device(module, "cpu"))  # it is offloaded
            return get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)

    def load_state(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        set_peft_model_state_dict(self.model, dict(tensors), adapter_name=adapter)

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
        parameters = list(self.clip.parameters())
        frozen = [parameter for parameter in parameters if id(parameter) not in of_adapters]
        return frozen, [parameter for parameter in parameters if id(parameter) in of_adapters]


class PromptSet(PeftSet):
    """Adapters that are prompts; a task can use those of several adapters at once: of its group and its own."""

    @property
    def container(self) -> PromptContainer:
        return self.clip.mmap

    disabled = AdapterSet.disabled  # an empty route disables prompts

    def add(self, name: str, seed: int) -> None:
        """Add an adapter with new parameters."""
        with _new_parameters(seed):
            self.model.add_adapter(name, copy.deepcopy(self.config))

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        return dict(self.container.mmap_generators[adapter].named_parameters())

    def text_parameters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        # Not by the adapters' names: another thread may be about to add one.
        prompts = [tensor for part in list(self.container.mmap_generators.values()) for tensor in part.parameters()]
        parts = (module for _, module in self.clip.named_modules(memo={self.container}))
        frozen = dict.fromkeys(tensor for part in parts for tensor in part._parameters.values() if tensor is not None)
        return list(frozen), prompts if "text" in self.config.towers else []


def make_adapters(clip: PreTrainedModel, config: PeftConfig | None, seed: int) -> AdapterSet:
    """The adapters of a method, added to a CLIP; with `None`, no adapters.

    Raises:
        ValueError: the config does not fit the model, or has `modules_to_save` with prompts.
    """
    if config is None:
        return AdapterSet(clip)
    if isinstance(config, LinearProbeConfig):
        return ProbeSet(clip, config)
    if not isinstance(config, PromptConfig):
        if any(parameter.is_meta for parameter in clip.parameters()):
            raise ValueError(
                f"The {type(clip).__name__} is offloaded, so {type(config).__name__} has no weights to start from; "
                "make the classifier first, and offload it then."
            )
        return PeftSet(clip, config, seed)
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save={config.modules_to_save} is not possible with prompts of many tasks, since only one "
            "adapter's copy of a module can run in a batch; leave it out, or use get_peft_model for a single adapter."
        )
    return PromptSet(clip, config, seed)


@contextmanager
def _new_parameters(seed: int) -> Iterator[None]:
    """Seed torch's random numbers inside the `with` block. Parameters that are made in inference mode cannot train."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.inference_mode(False), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield

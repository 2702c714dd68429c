"""The adapters of a classifier: one interface for all methods, and the two without PEFT, linear probes and none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from ..methods.linear_probe import LinearProbeConfig, start_probe
from ..tuner.assemble import AdapterPrompts, Prompts, Route
from ..tuner.container import PromptContainer


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

    def config_of(self, adapter: str) -> PeftConfig | None:
        """The settings of one adapter, as PEFT completed them when it put the adapter into the model."""
        return self.config

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

    def uses_texts(self, route: Route) -> bool:
        """Whether the linear classifier of a task with this route is made of text features."""
        return True

    def takes_other_classes(self, route: Route) -> bool:
        """Whether a task with this route can have other classes than it was trained on."""
        return self.uses_texts(route)

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

    def uses_texts(self, route: Route) -> bool:
        return not route

    def class_weights(self, routes: Sequence[Route], text_features: TextFeatures) -> ClassWeights:
        if not all(routes):  # zero-shot
            return super().class_weights(routes, text_features)
        probes = [self.probe(name) for (name,) in routes]
        return torch.cat([probe.weight for probe in probes]), torch.cat([probe.bias for probe in probes])

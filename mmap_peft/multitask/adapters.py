"""The adapters of a classifier: one interface for all methods. By itself it is that of no adapters, zero-shot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from ..tuner.assemble import AdapterPrompts, Prompts, Route
from ..tuner.container import PromptContainer


GLOBAL = "global"  # the adapter that all tasks share before they are grouped

TextFeatures = Callable[[], Sequence[torch.Tensor]]  # returns the unit text features of each task's classes
ClassWeights = tuple[torch.Tensor, torch.Tensor | float]  # (classes of all tasks, dim), and (classes) or 0


def feature_size(clip: PreTrainedModel) -> int:
    """Number of elements of an image or text feature of a CLIP."""
    return getattr(clip.config, "projection_dim", None) or clip.config.vision_config.hidden_size


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

    def chosen_settings(self, adapter: str) -> dict[str, float]:
        """Settings of one adapter that were chosen after it was made, in place of those of its config."""
        return {}

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by name."""
        return {}

    def state_of(self, adapter: str) -> dict[str, torch.Tensor]:
        """The tensors of an adapter's file, by their names there."""
        return {name: parameter.detach() for name, parameter in self.parameters_of(adapter).items()}

    def needed_state(self, adapter: str, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the names, shapes and dtypes that an adapter's file must have, which holds `found`; the adapter
        need not be there yet."""
        return self.state_of(adapter if adapter in self.names else self.names[0])

    @torch.no_grad()
    def load_state(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state_of`."""
        for name, parameter in self.parameters_of(adapter).items():
            parameter.copy_(tensors[name])

    def enter(
        self, adapter: str, classes: int, text_features: Callable[[], torch.Tensor], seed: int | None = None
    ) -> None:
        """Prepare for a new task, given the name of its own adapter, its number of classes, and a function that
        computes their unit text features by the plain base, (classes, dim). `seed` is of initial values that are made
        here; `None`: that of the other adapters."""

    def check_routes(self, routes: Mapping[str, Route]) -> None:
        """Raise a `ValueError` if tasks cannot be trained with these routes, by their names."""

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

    def part(self, route: Route) -> nn.Module | None:
        """What a task with this route has on pooled features, a `PooledModule`, or `None`."""
        return None

    def image_features(
        self, features: torch.Tensor, routes: Sequence[Route], numbers: torch.Tensor, counts: Sequence[int] | None
    ) -> torch.Tensor:
        """Pooled image features, (images, dim), changed by adapters on them; `numbers`, (images,), are those of the
        images' routes, and `counts`, if known, says how many images each has. They are not of unit length."""
        return features

    def added_logits(
        self,
        features: torch.Tensor,
        routes: Sequence[Route],
        numbers: torch.Tensor,
        counts: Sequence[int] | None,
        classes: int,
    ) -> torch.Tensor | None:
        """What adapters add to the logits of each image's own classes, (images, classes), with zeros for tasks that
        have fewer, or `None`. `features` are of unit length; `numbers` and `counts` as for
        `image_features`."""
        return None

    def class_weights(self, routes: Sequence[Route], text_features: TextFeatures) -> ClassWeights:
        """The linear classifier of unit image features: weight and bias for the classes of tasks with these routes."""
        return torch.cat(list(text_features())), 0.0

    @property
    def empty_caches(self) -> list[str]:
        """Names of the adapters whose cache of training images is still empty."""
        return []

    def uses_texts(self, route: Route) -> bool:
        """Whether the linear classifier of a task with this route depends on text features."""
        return True

    def weights_from_texts(self, route: Route) -> bool:
        """Whether logits are a function of image and text features alone, without parameters for each class."""
        return self.uses_texts(route)

    def takes_other_classes(self, route: Route) -> bool:
        """Whether a task with this route can have other classes than it was trained on, see `other_class_weights`."""
        return self.uses_texts(route)

    def other_class_weights(self, routes: Sequence[Route], text_features: TextFeatures) -> ClassWeights:
        """As `class_weights`, for any classes: by their texts alone, without parameters of the tasks' own classes."""
        return torch.cat(list(text_features())), 0.0

    def class_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """Those parameters of an adapter that have a row for each class of its task, by name."""
        return {}

    def text_parameters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The parameters that text features depend on: those of the frozen base, and those of adapters."""
        return list(self.clip.parameters()), []


@contextmanager
def new_parameters(seed: int) -> Iterator[None]:
    """Seed torch's random numbers inside the `with` block. Parameters that are made in inference mode cannot train."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.inference_mode(False), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield

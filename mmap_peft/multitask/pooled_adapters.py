"""The adapters of methods on pooled features: a module for each task, beside the CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..methods.pooled import PooledConfig, PooledModule, Weights
from ..tuner.assemble import Route
from .adapters import AdapterSet, ClassWeights, TextFeatures, new_parameters


class PooledSet(AdapterSet):
    """A `PooledModule` for each task. An empty route is the plain base.

    Args:
        clip (`PreTrainedModel`), config (`PooledConfig`): as for `AdapterSet`.
        seed (`int`): seed of initial values, the same for all tasks that are not given another.
    """

    def __init__(self, clip: PreTrainedModel, config: PooledConfig, seed: int) -> None:
        super().__init__(clip, config)
        self.parts, self.seed = nn.ModuleList(), seed
        self._names: list[str] = []

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def first_route(self, task_adapter: str) -> Route:
        return (task_adapter,)

    def part(self, route: Route) -> PooledModule | None:
        """The module of the task with this route; `None` for the plain base."""
        return self.parts[self._names.index(route[0])] if route else None

    def chosen_settings(self, adapter: str) -> dict[str, float]:
        return self.part((adapter,)).chosen_settings()

    def enter(
        self, adapter: str, classes: int, text_features: Callable[[], torch.Tensor], seed: int | None = None
    ) -> None:
        """Add a module for a task."""
        features = text_features()
        with new_parameters(self.seed if seed is None else seed):
            self.parts.append(self.config.module_class(self.config, features))
        self._names.append(adapter)

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        return dict(self.part((adapter,)).named_parameters())

    def state_of(self, adapter: str) -> dict[str, torch.Tensor]:
        return self.part((adapter,)).state_dict()

    def needed_state(self, adapter: str, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.part((adapter,)).needed_state(found)

    def load_state(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.part((adapter,)).load_state_dict(dict(tensors))

    def reset(self, names: Sequence[str], seed: int) -> None:
        """Remove all modules; `enter` makes new ones."""
        self.parts, self._names, self.seed = nn.ModuleList(), [], seed

    def image_features(
        self, features: torch.Tensor, routes: Sequence[Route], numbers: torch.Tensor, counts: Sequence[int] | None
    ) -> torch.Tensor:
        def changed(part: PooledModule | None, own: torch.Tensor) -> torch.Tensor:
            return own if part is None else part.image_features(own)

        return self._by_part(changed, features, routes, numbers, counts)

    def added_logits(
        self,
        features: torch.Tensor,
        routes: Sequence[Route],
        numbers: torch.Tensor,
        counts: Sequence[int] | None,
        classes: int,
    ) -> torch.Tensor | None:
        if not self.config.module_class.adds_logits:
            return None

        def added(part: PooledModule | None, own: torch.Tensor) -> torch.Tensor:
            found = own.new_zeros(len(own), 0).float() if part is None else part.added_logits(own)
            return F.pad(found, (0, classes - found.shape[1]))

        return self._by_part(added, features, routes, numbers, counts)

    def _by_part(
        self,
        of: Callable[[PooledModule | None, torch.Tensor], torch.Tensor],
        features: torch.Tensor,
        routes: Sequence[Route],
        numbers: torch.Tensor,
        counts: Sequence[int] | None,
    ) -> torch.Tensor:
        """What `of` makes of each route's module and image features, in the order of the images."""
        if len(routes) == 1:
            return of(self.part(routes[0]), features)
        counts = numbers.bincount(minlength=len(routes)).tolist() if counts is None else counts
        order = numbers.argsort(stable=True)
        parts = zip(map(self.part, routes), features[order].split(list(counts)))
        return torch.cat([of(part, own) for part, own in parts])[order.argsort()]

    @property
    def empty_caches(self) -> list[str]:
        return [name for name in self._names if self.part((name,)).is_empty]

    def uses_texts(self, route: Route) -> bool:
        return not route or self.config.module_class.weights_from_texts

    def weights_from_texts(self, route: Route) -> bool:
        return self.uses_texts(route) and not (route and self.config.module_class.adds_logits)

    def class_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        return {} if self.uses_texts((adapter,)) else self.parameters_of(adapter)

    def class_weights(self, routes: Sequence[Route], text_features: TextFeatures) -> ClassWeights:
        return self._weights(routes, text_features, "class_weights")

    def other_class_weights(self, routes: Sequence[Route], text_features: TextFeatures) -> ClassWeights:
        return self._weights(routes, text_features, "other_class_weights")

    def _weights(self, routes: Sequence[Route], text_features: TextFeatures, kind: str) -> ClassWeights:
        found: list[Sequence[torch.Tensor]] = []  # at most once computed, and only if a module asks for them

        def of(number: int) -> torch.Tensor:
            if not found:
                found.append(text_features())
            return found[0][number]

        parts: list[Weights] = []
        for number, route in enumerate(routes):
            part = self.part(route)
            parts.append((of(number), None) if part is None else getattr(part, kind)(lambda number=number: of(number)))
        weights = torch.cat([weight for weight, _ in parts])
        if all(bias is None for _, bias in parts):
            return weights, 0.0
        return weights, torch.cat([weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts])

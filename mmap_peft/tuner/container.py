"""The PEFT layer that holds the prompts of all adapters of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from .assemble import AdapterPrompts, Place, Prompts, Route, Routing, assemble, interchangeable
from .context import Overrides


overrides: Overrides[Routing] = Overrides("mmap_peft_routes")  # what `use_routes` sets, by container


def bracketed(name: str) -> str:
    """PEFT's name of a classifier's adapter, which is part of no other name: `<art>` for `art`."""
    return f"<{name}>"


def plain_name(key: str) -> str:
    """The name of the adapter that PEFT knows by this one, without the brackets."""
    return key[1:-1] if key.startswith("<") and key.endswith(">") else key


class PromptContainer(nn.Module, BaseTunerLayer):
    """Child `mmap` of a model with prompts: holds the generators of all adapters.

    PEFT saves, loads, switches and counts what it finds in `mmap_generators`. New prompts get the device and dtype of
    the `weight` of `anchor`, a module of the base.

    Attributes:
        layers (`dict[str, frozenset[tuple[str, int]]]`): for each adapter, the towers and layers that get its prompts.
        with_modules_to_save (`set[str]`): the adapters that have `modules_to_save`.
        as_tokens (`bool`): as for `Prompts`, for all forward passes.
        handles (`list[RemovableHandle]`): handles of the hooks that pass prompts to the layers of the model.
    """

    adapter_layer_names = ("mmap_generators",)

    def __init__(self, anchor: nn.Module) -> None:
        super().__init__()
        self._anchor = (anchor,)  # a tuple: as a child it would be saved a second time
        self.mmap_generators = nn.ModuleDict()
        self.layers: dict[str, frozenset[Place]] = {}
        self.with_modules_to_save: set[str] = set()
        self.as_tokens = False
        self.handles: list[RemovableHandle] = []
        self._active_adapter = []

    def get_base_layer(self) -> nn.Module:
        """The module from which PEFT takes the device and dtype of new prompts."""
        return self._anchor[0]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.layers.pop(adapter_name, None)
        self.with_modules_to_save.discard(adapter_name)

    def check_modules_to_save(self, routes: Sequence[Route]) -> None:
        """Raise a `ValueError` if an adapter has `modules_to_save` and a route is not that of the active adapters."""
        if self.with_modules_to_save and any(list(route) != list(self.active_adapters) for route in routes):
            raise ValueError(
                f"Adapters {', '.join(sorted(self.with_modules_to_save))} have modules_to_save, but PEFT runs those "
                "of the active adapter on every row; leave modules_to_save out, or switch adapters with set_adapter."
            )

    def routing(self, routes: Sequence[Route], given: Iterable[str] = (), **options: Any) -> Routing:
        """The routing of routes that name adapters, or prompts that are `given` to `prompts`."""
        keys = {plain_name(key): key for key in self.mmap_generators}
        routing = Routing.of([*keys, *given], routes, **options)
        return replace(routing, used=frozenset(keys.get(name, name) for name in routing.used))

    def adapter_prompts(self, adapter: str, towers: Sequence[str]) -> AdapterPrompts:
        """The prompts of one adapter for these towers, computed by its generator."""
        generator = self.mmap_generators[adapter]
        prompts = {
            tower: _from_layer(generator.first_layer, generator(tower))
            for tower in towers
            if tower in generator.depths
        }
        return AdapterPrompts(prompts, self.layers[adapter], generator.stays_in_sequence, generator.position)

    def prompts(
        self,
        towers: Sequence[str],
        routing: Routing | None = None,
        given: Mapping[str, AdapterPrompts] | None = None,
    ) -> Prompts | None:
        """The prompts of one forward pass through these towers; `None` if adapters are disabled. The default routing
        is that of `use_routes`, or else the active adapters. `given` are additional prompts by name."""
        if self.disable_adapters:
            return None
        # Adapters of other methods may be active, too.
        active = tuple(name for name in self.active_adapters if name in self.mmap_generators)
        routing = routing or overrides.get(self) or Routing.of(list(self.mmap_generators), [active])
        # A compiled graph serves all routes, so it computes the prompts of all adapters, if they can be combined.
        compiled = torch.compiler.is_compiling() and bool(routing.index.shape[1])
        names = list(self.mmap_generators)  # once, since another thread may add an adapter meanwhile
        adapters = {name: self.adapter_prompts(name, towers) for name in names if compiled or name in routing.used}
        if compiled and not interchangeable(adapters.values()):
            adapters = {name: prompts for name, prompts in adapters.items() if name in routing.used}
        adapters = [adapters.get(name) for name in names]
        adapters += [prompts if name in routing.used else None for name, prompts in (given or {}).items()]
        return assemble(adapters, routing, towers, self.as_tokens)


def _from_layer(first: int, prompts: torch.Tensor) -> torch.Tensor:
    """Prompts by the number of their layer, with zeros for the layers before the first one that gets prompts."""
    return torch.cat([prompts.new_zeros(first, *prompts.shape[1:]), prompts]) if first else prompts


def prompt_container(model: nn.Module) -> PromptContainer:
    """The container of a model with prompts.

    Raises:
        ValueError: the model has no prompts.
    """
    for module in model.modules():
        if isinstance(module, PromptContainer):
            return module
    raise ValueError(f"{type(model).__name__} has no prompts; write get_peft_model(model, MmAPConfig()) first.")

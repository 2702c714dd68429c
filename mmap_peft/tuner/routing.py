"""Whose prompts feed which row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


Route = tuple[str, ...]


def take_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`tensor[rows]`. Its backward pass is slow on a CPU; that of `index_select`, not deterministic on a GPU."""
    return tensor.index_select(0, rows) if tensor.device.type == "cpu" else tensor[rows]


def spread(tensor: torch.Tensor, rows: torch.Tensor | None, batch: int) -> torch.Tensor:
    """A tensor of routes, (routes, ...), for the rows of a batch: (batch, ...). `rows`: the route of each; `None` if
    there is one."""
    return tensor.expand(batch, *tensor.shape[1:]) if rows is None else take_rows(tensor, rows)


class RoutedPrompts(NamedTuple):
    """One layer's prompts for a batch.

    Attributes:
        prompts: (routes, prompts, width); routes with fewer prompts are filled up with zeros.
        valid: (routes, prompts), false where filled up; `None` if all routes have the same number of prompts.
        rows: (batch,), which of the routes a row uses; `None` if there is one route.
    """

    prompts: torch.Tensor
    valid: torch.Tensor | None
    rows: torch.Tensor | None

    def of_rows(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        """Spread a tensor (routes, ...) over the rows of a batch: (batch, ...)."""
        return spread(tensor, self.rows, batch)


@dataclass(frozen=True)
class Routing:
    """Whose prompts a batch uses, as tensors: a compiled model need not know which routes they stand for.

    Attributes:
        used: the adapters of all routes; the prompts of others are not made.
        index: (routes, slots), number of each adapter of a route among the model's; one past the last for none.
        full: whether no slot stands for none.
        rows: for each tower the route of each row; under `"classes"`, the class of each row of the text batch.
        pooled: whether nothing but pooled features is used.
    """

    used: frozenset[str]
    index: torch.Tensor
    full: bool
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    pooled: bool = False


class PromptContainer(nn.Module, BaseTunerLayer):
    """Child `mmap` of a model with prompts: holds the generators of all adapters and knows the current routing.

    PEFT saves, loads, switches and counts what it finds in `mmap_generators`.

    Args:
        anchor (`nn.Module`): a module of the base with a `weight`, whose device and dtype new prompts get.
    """

    adapter_layer_names = ("mmap_generators",)

    def __init__(self, anchor: nn.Module) -> None:
        super().__init__()
        self._anchor = (anchor,)  # a tuple: as a child it would be saved a second time
        self.mmap_generators = nn.ModuleDict()
        self.places: dict[str, set[tuple[str, int]]] = {}
        self.routing: Routing | None = None
        self._active_adapter = []

    def get_base_layer(self) -> nn.Module:
        """The module whose device and dtype the prompts follow, which is where PEFT looks for them."""
        return self._anchor[0]

    @property
    def current(self) -> Routing | None:
        """What `use_routes` says, or else the active adapters; `None` if adapters are switched off."""
        if self.disable_adapters:
            return None
        # Adapters of other methods may be active beside these.
        return self.routing or self.route(
            [tuple(name for name in self.active_adapters if name in self.mmap_generators)]
        )

    def route(self, routes: Sequence[Route]) -> Routing:
        """A routing of these routes, without rows."""
        names = list(self.mmap_generators)
        slots = max(map(len, routes))
        index = [[names.index(name) for name in route] + [len(names)] * (slots - len(route)) for route in routes]
        used = frozenset(name for route in routes for name in route)
        index = torch.tensor(index, dtype=torch.long, device=self.weight.device).view(len(routes), slots)
        return Routing(used, index, min(map(len, routes)) == slots)

    def generators(self, routing: Routing) -> list[nn.Module]:
        """The generators that a routing may use. A compiled graph serves all routes, so it is all of them then."""
        everything = torch.compiler.is_compiling()
        return [made for name, made in self.mmap_generators.items() if everything or name in routing.used]

    def first_prompted(self, tower: str, routing: Routing, layers: int) -> int:
        """Number of the first of a tower's layers that gets prompts of these routes; `layers` if none does."""
        places = set().union(*(self.places[name] for name in routing.used))
        return min((layer for place, layer in places if place == tower), default=layers)

    def rides(self, routing: Routing | None) -> bool:
        """Whether the prompts in use ride on from layer to layer."""
        kinds = set() if routing is None else {generator.rides for generator in self.generators(routing)}
        if len(kinds) > 1:
            raise ValueError(
                "Adapters whose prompts ride on (CoOp, VPT, IVLP, MaPLe) and others (MmAP) are active together; "
                "activate those of one kind only."
            )
        return True in kinds

    def entering(self, tower: str, hidden_states: torch.Tensor) -> RoutedPrompts | None:
        """Prompts that ride on from the first layer, or `None` if there are none."""
        routing = self.current
        if not self.rides(routing):
            return None
        routed = self.routed(routing, tower, 0, hidden_states)
        if routed is not None and routed.valid is not None:
            raise ValueError(
                f"Routes of one batch have different numbers of prompts in the {tower} tower, but prompts that ride "
                "on need the same in every row; give each route as many."
            )
        return routed

    @property
    def position(self) -> str:
        """Where class names stand beside the prompts in use: at the `"end"`, in the `"middle"` or in `"front"`."""
        found = {generator.position for generator in self.generators(self.current)}
        if len(found) > 1:
            raise ValueError(f"Adapters with names at {', '.join(sorted(found))} are active together; use one alone.")
        return found.pop()

    def routed(self, routing: Routing, tower: str, layer: int, hidden_states: torch.Tensor) -> RoutedPrompts | None:
        """The prompts that a layer gets, or `None` if it gets none.

        Args:
            routing: whose prompts.
            tower: `"text"` or `"vision"`.
            layer: number of the layer.
            hidden_states: (batch, tokens, width), what the layer gets; the prompts get its device and dtype.

        Raises:
            ValueError: routes were given for another number of rows.
        """
        batch, device, usable = len(hidden_states), hidden_states.device, self.generators(routing)
        wanted = [
            made in usable and (tower, layer) in self.places[name] for name, made in self.mmap_generators.items()
        ]
        made = [
            generator.prompts(tower, layer) if needed else None
            for needed, generator in zip(wanted, self.mmap_generators.values())
        ]
        routes, slots = routing.index.shape
        if not slots or all(prompts is None for prompts in made):
            return None
        rows = routing.rows.get(tower)
        if rows is None and routes > 1:
            raise ValueError(
                f"{routes} routes were given, but not which row of the {tower} batch uses which; write "
                f"use_routes(model, routes, {tower}=[...]) with a number for each of the {batch} rows."
            )
        if rows is not None and len(rows) != batch:
            raise ValueError(
                f"Routes were given for {len(rows)} rows of the {tower} batch, which has {batch}; write one number a "
                "row."
            )
        index, rows = routing.index.to(device), None if rows is None or routes == 1 else rows.to(device)
        some = next(prompts.to(hidden_states) for prompts in made if prompts is not None)
        if any(prompts is not None and prompts.dim() == 3 for prompts in made):
            return self._of_classes(made, index, rows, routing.rows.get("classes"), some, batch)
        made = [some[:0] if prompts is None else prompts.to(hidden_states) for prompts in [*made, None]]
        counts = [len(prompts) for prompts in made]
        most = max(counts)
        table = torch.stack([nn.functional.pad(prompts, (0, 0, 0, most - len(prompts))) for prompts in made])
        prompts, valid = table[index].flatten(1, 2), None
        if not routing.full or any(needed and count < most for needed, count in zip(wanted, counts)):
            real = torch.arange(most, device=device) < torch.tensor(counts, device=device)[:, None]
            valid = real[index].flatten(1, 2)
        return RoutedPrompts(prompts, valid, rows)

    def _of_classes(
        self,
        made: list[torch.Tensor | None],
        index: torch.Tensor,
        rows: torch.Tensor | None,
        classes: torch.Tensor | None,
        some: torch.Tensor,
        batch: int,
    ) -> RoutedPrompts:
        """As `routed`, where prompts differ from class to class: they are chosen for each row."""
        sizes = {prompts.shape[:-1] for prompts in made if prompts is not None}
        if len(sizes) > 1 or index.max() == len(made):
            raise ValueError(
                "Class-specific prompts are used together with others of another number of prompts or classes, or "
                "routes differ in length; give all adapters the same num_prompts and num_classes."
            )
        if classes is None:
            classes = torch.arange(batch)
        if len(classes) != batch or classes.max() >= len(some):
            raise ValueError(
                f"The text batch has {batch} rows for {len(some)} class-specific contexts; give one text a class in "
                "their order, or write use_routes(model, routes, classes=[...]) with the class of each row."
            )
        table = torch.stack([torch.zeros_like(some) if prompts is None else prompts.to(some) for prompts in made])
        routes = index.expand(batch, -1) if rows is None else index[rows]
        return RoutedPrompts(table[routes, classes.to(some.device)[:, None]].flatten(1, 2), None, None)


class RoutingHook:
    """Before an encoder runs, hands the current routing to its layers as keyword `prompt_routing`.

    As an argument it is there again when a checkpointed layer is computed once more in the backward pass, by when
    `use_routes` has long ended.

    Args:
        container (`PromptContainer`): what knows the routing.
    """

    def __init__(self, container: PromptContainer) -> None:
        self.container = container

    def __call__(self, encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {**kwargs, "prompt_routing": self.container.current}

    @staticmethod
    def attach(encoder: nn.Module, container: PromptContainer) -> None:
        """Hook an encoder."""
        encoder.register_forward_pre_hook(RoutingHook(container), with_kwargs=True)

    @staticmethod
    def detach(encoder: nn.Module) -> None:
        """Take the hook off."""
        for key, hook in list(encoder._forward_pre_hooks.items()):
            if isinstance(hook, RoutingHook):
                del encoder._forward_pre_hooks[key]
                del encoder._forward_pre_hooks_with_kwargs[key]


def prompt_container(model: nn.Module) -> PromptContainer:
    """The container of a model with prompts.

    Raises:
        ValueError: the model has no prompts.
    """
    for module in model.modules():
        if isinstance(module, PromptContainer):
            return module
    raise ValueError(f"{type(model).__name__} has no prompts; write get_peft_model(model, MmAPConfig()) first.")


@contextmanager
def use_routes(
    model: nn.Module,
    routes: Route | Sequence[Route],
    *,
    text: Sequence[int] | torch.Tensor | None = None,
    vision: Sequence[int] | torch.Tensor | None = None,
    classes: Sequence[int] | torch.Tensor | None = None,
    pooled: bool = False,
) -> Iterator[None]:
    """Inside the `with` block, rows of a batch use the prompts of the given adapters instead of the active one's.

    What can be trained stays what it was: unlike `set_adapter`, no `requires_grad` flag is touched.

    ```python
    with use_routes(model, ("group_0", "art")):  # every row uses both adapters, in this order
        model(**inputs)
    with use_routes(model, [("group_0", "art"), ("group_0", "clipart")], text=[0, 0, 1, 1], vision=[0, 1, 1]):
        model(**inputs)  # four texts and three images, each with the prompts of its own route
    ```

    Args:
        model (`nn.Module`): a `PeftModel`, or a transformers model with an adapter in it.
        routes (`tuple[str, ...]` or a sequence of them): one route, or several. An empty route means no prompts.
        text (`Sequence[int]`, *optional*): for each row of the text batch, which of the routes it uses.
        vision (`Sequence[int]`, *optional*): for each row of the image batch, which of the routes it uses.
        classes (`Sequence[int]`, *optional*): for each row of the text batch, its class, for prompts that are
            class-specific. `None`: row i is of class i.
        pooled (`bool`): nothing but pooled features is used, so that a last layer may leave out other tokens; the
            `last_hidden_state` of a vision tower then holds the first one alone.

    Raises:
        ValueError: an adapter is unknown, or a row's number is not one of a route.
    """
    container = prompt_container(model)
    several = not all(isinstance(name, str) for name in routes)
    routes = [tuple(route) for route in routes] if several else [tuple(routes)]
    for name in {name for route in routes for name in route}:
        if name not in container.mmap_generators:
            raise ValueError(
                f"{name!r} is no adapter of the model; write one of {', '.join(container.mmap_generators) or 'none'}."
            )
    routing = replace(container.route(routes), pooled=pooled)
    for tower, numbers in (("text", text), ("vision", vision)):
        if numbers is None:
            continue
        rows = torch.as_tensor(numbers)
        unchecked = torch.compiler.is_compiling()  # a look at the numbers would break the graph
        if not unchecked and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(routes):
            raise ValueError(
                f"{tower}={rows.tolist()} names a route that was not given; write numbers from 0 to {len(routes) - 1}."
            )
        routing.rows[tower] = rows.to(container.weight.device)
    if classes is not None:
        routing.rows["classes"] = torch.as_tensor(classes).to(container.weight.device)
    before, container.routing = container.routing, routing
    try:
        yield
    finally:
        container.routing = before

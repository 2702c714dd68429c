"""Combines the prompts of adapters into the value that is passed to one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .devices import on_device, on_host


Route = tuple[str, ...]
Place = tuple[str, int]  # a tower and the number of one of its layers


def take_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`tensor[rows]`: its backward pass is slow on a CPU; that of `index_select` is not deterministic on a GPU."""
    return tensor.index_select(0, rows) if on_host(tensor.device) else tensor[rows]


class AdapterPrompts(NamedTuple):
    """The prompts of one adapter.

    Attributes:
        towers: the generator's output for each tower: (depth, prompts, width), or (depth, classes, prompts, width) if
            prompts are class-specific.
        layers: the layers that get them.
        stays_in_sequence, position: as for `Prompts`.
    """

    towers: Mapping[str, torch.Tensor]
    layers: frozenset[Place]
    stays_in_sequence: bool = False
    position: str = "end"


def interchangeable(adapters: Collection[AdapterPrompts]) -> bool:
    """Whether `assemble` can combine all of these adapters, so that one compiled graph serves any of them."""
    kinds = []
    for adapter in adapters:
        shapes = {tower: prompts.shape for tower, prompts in adapter.towers.items()}
        # Prompts that do not stay in the sequence can always be combined.
        kinds.append((adapter.position, adapter.layers, shapes) if adapter.stays_in_sequence else None)
    return all(kind == kinds[0] for kind in kinds)


class LayerPrompts(NamedTuple):
    """The prompts of one layer.

    Attributes:
        states: (routes, prompts, width); routes with fewer prompts are padded with zeros.
        real: (routes, prompts), false for padding; `None` if there is none.
        per_row: whether the first dimension is the rows of the text batch instead of routes.
        key_and_value: keys and values of the prompts in the layer's attention, if they were computed before.
    """

    states: torch.Tensor
    real: torch.Tensor | None
    per_row: bool = False
    key_and_value: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class Routing:
    """The adapters whose prompts each row of a batch uses, as tensors, so that one compiled graph serves all routes.

    Attributes:
        used: names of all adapters that a route uses.
        index: (routes, slots), for each route the numbers of its adapters among those of the model; the slots that a
            shorter route leaves empty hold the number of adapters.
        full: whether every slot holds an adapter.
        rows: for each tower, the route of each row, (batch,); under `"classes"`, the class of each row of the text
            batch.
        pooled: as for `Prompts`.
    """

    used: frozenset[str]
    index: torch.Tensor
    full: bool
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)
    pooled: bool = False

    @classmethod
    def of(cls, names: Sequence[str], routes: Sequence[Route], pooled: bool = False, **rows: torch.Tensor) -> Routing:
        """The routing of these routes in a model with adapters of these names.

        Raises:
            ValueError: a route names an adapter that the model does not have.
        """
        used = frozenset(name for route in routes for name in route)
        for name in used.difference(names):
            raise ValueError(f"{name!r} is no adapter of the model; write one of {', '.join(names) or 'none'}.")
        slots = max(map(len, routes))
        index = [[names.index(name) for name in route] + [len(names)] * (slots - len(route)) for route in routes]
        index = torch.tensor(index, dtype=torch.long).view(len(routes), slots)
        return cls(used, index, min(map(len, routes)) == slots, rows, pooled)


@dataclass(frozen=True)
class Prompts:
    """All prompts of one forward pass. Passed as the keyword argument `prompts` to a model or to one of its towers.

    Attributes:
        layers: prompts by tower and layer, for all layers that get prompts.
        routes: number of routes.
        rows: for each tower the route of each row, (batch,). Not needed if there is one route.
        stays_in_sequence: whether prompts stay in the sequence for later layers.
        position: position of class names among text prompts that replace words: `"end"`, `"middle"`, or `"front"`.
        pooled: whether only pooled features are used.
        as_tokens: whether prompts that do not stay in the sequence are added to it as tokens and removed after each
            layer, instead of being keys and values of its attention. The results are the same.
        text_ends: (batch,), position of the end of each text, if it is known.
    """

    layers: Mapping[Place, LayerPrompts] = field(default_factory=dict)
    routes: int = 1
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)
    stays_in_sequence: bool = False
    position: str = "end"
    pooled: bool = False
    as_tokens: bool = False
    text_ends: torch.Tensor | None = None

    def first_layer(self, tower: str) -> int | None:
        """Number of the first layer of a tower that gets prompts, or `None` if none does."""
        numbers = [layer for name, layer in self.layers if name == tower]
        return min(numbers) if numbers else None

    def length(self, tower: str) -> int:
        """Number of prompts that each row of a tower gets, padding included."""
        first = self.first_layer(tower)
        return 0 if first is None else self.layers[tower, first].states.shape[1]

    def spread(self, tower: str, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        """Expand a tensor with an entry for each route, (routes, ...), to the rows of a batch, (batch, ...).

        Raises:
            ValueError: the rows are missing, or are those of a batch of another size.
        """
        rows = self.rows.get(tower)
        if rows is None and self.routes > 1:
            raise ValueError(
                f"{self.routes} routes were given, but not which row of the {tower} batch uses which; write "
                f"use_routes(model, routes, {tower}=[...]) with a number for each of the {batch} rows."
            )
        if rows is not None and rows.shape[0] != batch:
            raise ValueError(
                f"Routes were given for {rows.shape[0]} rows of the {tower} batch, which has {batch}; write one "
                "number a row."
            )
        if self.routes == 1:
            return tensor.expand(batch, *tensor.shape[1:])
        return take_rows(tensor, on_device(rows, tensor.device))


def assemble(
    adapters: Sequence[AdapterPrompts | None],
    routing: Routing,
    towers: Sequence[str] = ("text", "vision"),
    as_tokens: bool = False,
) -> Prompts:
    """Combine the prompts of adapters for one forward pass through these towers. A function without side effects.

    `adapters` are numbered as in `routing.index`, with `None` for those that no route uses. Adapters that cannot be
    combined raise a `ValueError`.
    """
    used = [adapter for adapter in adapters if adapter is not None]
    stays = any(adapter.stays_in_sequence for adapter in used)
    if stays and not all(adapter.stays_in_sequence for adapter in used):
        raise ValueError(
            "Adapters whose prompts stay in the sequence (CoOp, VPT, IVLP, PromptSRC, MaPLe) and others (MmAP, MMRL "
            "tokens) are active together; activate those of one kind only."
        )
    positions = {adapter.position for adapter in used if "text" in towers} or {"end"}
    if len(positions) > 1:
        raise ValueError(f"Adapters with position={', '.join(sorted(positions))} are active together; use one alone.")
    layers: dict[Place, LayerPrompts] = {}
    for tower in towers if routing.index.shape[1] else ():
        tensors = {
            number: adapter.towers[tower]
            for number, adapter in enumerate(adapters)
            if adapter is not None and tower in adapter.towers
        }
        if any(tensor.dim() == 4 for tensor in tensors.values()):
            layers[tower, 0] = _of_classes(len(used), tensors, routing)
        elif tensors:
            of_tower = _of_tower(tower, adapters, tensors, routing)
            if stays and of_tower and next(iter(of_tower.values())).real is not None:
                raise ValueError(
                    f"Routes of one batch have different numbers of prompts in the {tower} tower, but prompts that "
                    "stay in the sequence need the same in every row; give each route as many."
                )
            layers.update(of_tower)
    return Prompts(layers, len(routing.index), routing.rows, stays, positions.pop(), routing.pooled, as_tokens)


def _of_tower(
    tower: str,
    adapters: Sequence[AdapterPrompts | None],
    tensors: Mapping[int, torch.Tensor],
    routing: Routing,
) -> dict[Place, LayerPrompts]:
    """Prompts of all layers of a tower, in a few operations for all layers together."""
    like = next(iter(tensors.values()))
    depth, most = (max(tensor.shape[size] for tensor in tensors.values()) for size in (0, 1))
    padded = [like.new_zeros(depth, most, like.shape[-1])] * (len(adapters) + 1)  # the last one is for empty slots
    for number, tensor in tensors.items():
        padded[number] = F.pad(tensor.to(like), (0, 0, 0, most - tensor.shape[1], 0, depth - tensor.shape[0]))
    index = on_device(routing.index, like.device)
    by_slot = take_rows(torch.stack(padded), index.flatten()).unflatten(0, index.shape)
    # (routes, slots, depth, prompts, width) -> depth times (routes, slots * prompts, width)
    states = by_slot.permute(2, 0, 1, 3, 4).flatten(2, 3).unbind()
    layers = {}
    for layer in range(depth):
        counts = [0] * len(padded)
        for number, tensor in tensors.items():
            if (tower, layer) in adapters[number].layers and layer < tensor.shape[0]:
                counts[number] = tensor.shape[1]
        fewest = min(count for count, adapter in zip(counts, adapters) if adapter is not None)
        real = None
        if not routing.full or fewest < most:
            slot_counts = on_device(counts, like.device)[index]
            real = (torch.arange(most, device=like.device) < slot_counts[..., None]).flatten(1, 2)
        if any(counts):
            layers[tower, layer] = LayerPrompts(states[layer], real)
    return layers


def _of_classes(used: int, tensors: Mapping[int, torch.Tensor], routing: Routing) -> LayerPrompts:
    """Class-specific text prompts, chosen for each row."""
    like = next(iter(tensors.values()))
    if any(tensor.shape != like.shape for tensor in tensors.values()) or not routing.full or len(tensors) < used:
        raise ValueError(
            "Class-specific prompts are used together with others of another number of prompts or classes, or "
            "routes differ in length; give all adapters the same num_prompts and num_classes."
        )
    table = torch.stack([tensors.get(number, like).to(like) for number in range(max(tensors) + 1)])
    rows, classes = routing.rows.get("text"), routing.rows.get("classes")
    if classes is None:  # row i is of class i
        classes = torch.arange(like.shape[1] if rows is None else rows.shape[0])
    unchecked = torch.compiler.is_compiling()  # reading values would break the graph
    if not unchecked and classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < like.shape[1]:
        raise wrong_classes(classes.shape[0], like.shape[1])
    index, classes = on_device(routing.index, like.device), on_device(classes, like.device)
    if rows is None or len(index) == 1:
        routes = index.expand(classes.shape[0], -1)
    else:
        routes = index[on_device(rows, like.device)]
    return LayerPrompts(table[routes, 0, classes[:, None]].flatten(1, 2), None, per_row=True)


def wrong_classes(batch: int, contexts: int) -> ValueError:
    """The error for a text batch that does not fit class-specific prompts."""
    return ValueError(
        f"The text batch has {batch} rows for {contexts} class-specific contexts; give one text a class in their "
        "order, or write use_routes(model, routes, classes=[...]) with the class of each row, from 0 to "
        f"{contexts - 1}."
    )

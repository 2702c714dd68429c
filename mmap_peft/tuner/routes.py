"""Choosing the adapters whose prompts are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from .assemble import Prompts, Route, Routing
from .container import PromptContainer, overrides, prompt_container


Rows: TypeAlias = Sequence[int] | torch.Tensor  # a number for each row of a batch


@contextmanager
def use_routes(
    model: nn.Module,
    routes: Route | Sequence[Route],
    *,
    text: Rows | None = None,
    vision: Rows | None = None,
    classes: Rows | None = None,
    pooled: bool = False,
) -> Iterator[None]:
    """Inside the `with` block, rows of a batch use the prompts of the given adapters instead of the active one's.

    It affects only the thread (and `asyncio` task) that runs the block. Unlike `set_adapter`, it changes no
    `requires_grad` flag.

    ```python
    with use_routes(model, ("group_0", "art")):  # every row uses both adapters, in this order
        model(**inputs)
    with use_routes(model, [("group_0", "art"), ("group_0", "clipart")], text=[0, 0, 1, 1], vision=[0, 1, 1]):
        model(**inputs)  # four texts and three images, each with the prompts of its own route
    ```

    Args:
        model (`nn.Module`): a `PeftModel`, or a transformers model with an adapter in it. If it was compiled by
            `torch.compile`, all `asyncio` tasks of a thread share its routes, so do not `await` inside a block.
        routes (`tuple[str, ...]` or a sequence of them): one route, or several. An empty route means no prompts.
        text, vision (`Sequence[int]`, *optional*): for each row of the text or image batch, the number of its route,
            counted from 0. Not needed for one route.
        classes (`Sequence[int]`, *optional*): for each row of the text batch, its class, for class-specific prompts.
            `None`: row i is of class i.
        pooled (`bool`): whether only pooled features are used. The last vision layer then may compute only its first
            token, and `last_hidden_state` holds no other.

    Raises:
        ValueError: an adapter is unknown, a row has a number that no route has, or an adapter has `modules_to_save`
            and a route is not that of the active adapters.
    """
    container = prompt_container(model)
    routing = _routing(container, routes, {"text": text, "vision": vision, "classes": classes}, pooled)
    with overrides.set(container, routing):
        yield


def make_prompts(
    model: nn.Module,
    routes: Route | Sequence[Route] | None = None,
    *,
    text: Rows | None = None,
    vision: Rows | None = None,
    classes: Rows | None = None,
    pooled: bool = False,
) -> Prompts | None:
    """Compute the prompts of one forward pass from the adapters as they are now.

    Pass them as the keyword argument `prompts` to the model, its CLIP or a tower. `use_routes` and the active adapters
    then have no effect.

    Args:
        model, routes, text, vision, classes, pooled: as for `use_routes`. Without routes, which the others need: the
            current ones, or else the active adapters.

    Returns:
        `Prompts`, which cannot be changed, or `None` if adapters are disabled.

    Raises:
        ValueError: as for `use_routes`, or rows without routes.
    """
    container = prompt_container(model)
    rows = {"text": text, "vision": vision, "classes": classes}
    if routes is None and (pooled or any(numbers is not None for numbers in rows.values())):
        raise ValueError("`text`, `vision`, `classes` and `pooled` go with routes; write `routes`, too.")
    routing = None if routes is None else _routing(container, routes, rows, pooled)
    return container.prompts(("text", "vision"), routing)


def _routing(
    container: PromptContainer, routes: Route | Sequence[Route], rows: Mapping[str, Rows | None], pooled: bool
) -> Routing:
    given: Any = (routes,) if isinstance(routes, str) else routes
    several = not all(isinstance(name, str) for name in given)
    listed = [tuple(route) for route in given] if several else [tuple(given)]
    container.check_modules_to_save(listed)
    tensors = {name: torch.as_tensor(numbers) for name, numbers in rows.items() if numbers is not None}
    for name, numbers in tensors.items():
        if numbers.numel() and (numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool):
            raise ValueError(
                f"Invalid value of `{name}`: expected an integer for each row of the batch, such as [0, 1]."
            )
    for tower in () if torch.compiler.is_compiling() else ("text", "vision"):  # values would break a graph
        numbers = tensors[tower].tolist() if tower in tensors else []
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(listed):
            raise ValueError(
                f"{tower}={numbers} names a route that was not given; write numbers from 0 to {len(listed) - 1}."
            )
    return container.routing(listed, pooled=pooled, **tensors)

"""Which adapters' prompts a `with` block uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .assemble import Route
from .container import overrides, prompt_container


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

    Only the thread (and `asyncio` task) that runs the block is concerned. What can be trained stays what it was: unlike
    `set_adapter`, no `requires_grad` flag is changed.

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
        ValueError: an adapter is unknown, a row's number is not one of a route, or an adapter that is not the active
            one has `modules_to_save`.
    """
    container = prompt_container(model)
    several = not all(isinstance(name, str) for name in routes)
    routes = [tuple(route) for route in routes] if several else [tuple(routes)]
    for name in dict.fromkeys(name for route in routes for name in route):
        if name not in container.mmap_generators:
            raise ValueError(
                f"{name!r} is no adapter of the model; write one of {', '.join(container.mmap_generators) or 'none'}."
            )
    container.check_modules_to_save(routes)
    rows = {}
    for tower, numbers in (("text", text), ("vision", vision)):
        if numbers is None:
            continue
        rows[tower] = torch.as_tensor(numbers)
        unchecked = torch.compiler.is_compiling()  # a look at the numbers would break the graph
        if (
            not unchecked
            and len(rows[tower])
            and not 0 <= int(rows[tower].min()) <= int(rows[tower].max()) < len(routes)
        ):
            raise ValueError(
                f"{tower}={rows[tower].tolist()} names a route that was not given; write numbers from 0 to "
                f"{len(routes) - 1}."
            )
    if classes is not None:
        rows["classes"] = torch.as_tensor(classes)
    routing = container.routing(routes, pooled=pooled, **rows)
    with overrides.set((*overrides.get(), (container, routing))):
        yield

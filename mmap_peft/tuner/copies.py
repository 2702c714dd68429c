"""Copies of one adapter whose prompts are leaves: one backward pass gives the gradient of each copy's loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .routing import prompt_container


@dataclass
class PromptCopies:
    """Copies of an adapter.

    Attributes:
        names: what routes call them.
        made: the adapter's prompts of each layer that gets some, as its parameters made them.
        leaves: for each of `made` a tensor (copies, *shape of the prompts), a leaf that holds it as often.
    """

    names: list[str]
    made: list[torch.Tensor]
    leaves: list[torch.Tensor]

    def pull_back(self, gradients: Sequence[torch.Tensor], parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """From gradients by `leaves` to those by the adapter's parameters, through its generator alone. Works once.

        Args:
            gradients (`Sequence[torch.Tensor]`): one for each of `leaves`, of its shape.
            parameters (`Sequence[nn.Parameter]`): the adapter's.

        Returns:
            (copies, elements of all parameters).
        """
        gradients = [part.to(prompts.dtype) for part, prompts in zip(gradients, self.made)]
        # All copies in one backward pass, which the parts' first dimension makes many of.
        parts = torch.autograd.grad(self.made, parameters, gradients, is_grads_batched=True, allow_unused=True)
        count = len(self.names)
        parts = [
            parameter.new_zeros(count, parameter.numel()) if part is None else part.reshape(count, -1)
            for part, parameter in zip(parts, parameters)
        ]
        return torch.cat(parts, dim=1)


class PromptCopy(nn.Module):
    """Stands in for a generator: the same prompts, but nothing that makes them.

    Args:
        generator (`nn.Module`): what it stands in for.
        prompts: its prompts by tower and layer.
    """

    def __init__(self, generator: nn.Module, prompts: dict[tuple[str, int], torch.Tensor]) -> None:
        super().__init__()
        self.rides, self.position = generator.rides, getattr(generator, "position", None)
        self._prompts = prompts  # neither parameters nor buffers: they are never saved

    def prompts(self, tower: str, layer: int) -> torch.Tensor | None:
        """As `PromptGenerator.prompts`."""
        return self._prompts.get((tower, layer))


@contextmanager
def prompt_copies(model: nn.Module, adapter: str, count: int) -> Iterator[PromptCopies]:
    """Inside the `with` block the model has copies of an adapter, which routes can name. PEFT knows nothing of them.

    Args:
        model (`nn.Module`): a model with prompts.
        adapter (`str`): name of the adapter.
        count (`int`): how many copies.
    """
    container = prompt_container(model)
    generator, places = container.mmap_generators[adapter], container.places[adapter]
    made = {place: generator.prompts(*place) for place in sorted(places)}
    made = {place: prompts for place, prompts in made.items() if prompts is not None}
    leaves = [torch.stack([prompts.detach()] * count).requires_grad_() for prompts in made.values()]
    names = [f"{adapter}/{number}" for number in range(count)]  # no adapter may be called so
    try:
        for name, *own in zip(names, *leaves):
            container.mmap_generators[name] = PromptCopy(generator, dict(zip(made, own)))
            container.places[name] = places
        yield PromptCopies(names, list(made.values()), leaves)
    finally:
        for name in names:
            if name in container.mmap_generators:
                del container.mmap_generators[name], container.places[name]

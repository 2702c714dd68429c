"""The probes of tasks on top of their prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..methods.text_probe import TextProbe
from ..tuner.assemble import Route
from ..tuner.container import bracketed


PREFIX = "probe."  # of the names of a probe's tensors in an adapter's file; plain PEFT leaves them out


class TaskProbes(nn.Module):
    """A `TextProbe` in the own adapter of each task; an adapter of several tasks has none.

    Args:
        scale (`float`, *optional*): s of the probes. `None`: there are no probes.
        dim (`int`): number of elements of a feature.
    """

    def __init__(self, scale: float | None, dim: int) -> None:
        super().__init__()
        self.scale, self.dim = scale, dim
        self.probes = nn.ModuleDict()  # by the bracketed name of the adapter: others could be names of its methods
        self.class_counts: dict[str, int] = {}  # of each task, by the name of its own adapter

    def add(self, adapters: Iterable[str], device: torch.device) -> None:
        """Add the probes of those of these adapters that are some task's own."""
        for name in adapters:
            with torch.inference_mode(False):  # parameters that are made in inference mode cannot train
                probe = self._new(name, device)
            if probe is not None:
                self.probes[bracketed(name)] = probe

    def clear(self) -> None:
        """Remove all probes."""
        self.probes = nn.ModuleDict()

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter's probe, by their names in the adapter's file; none if it has no probe."""
        return _named(self._of(adapter))

    def needed(self, adapter: str) -> dict[str, torch.Tensor]:
        """As `parameters_of`, on no device, for an adapter that need not be there yet."""
        return _named(self._new(adapter, "meta"))

    def class_weights(
        self, routes: Sequence[Route], text_features: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias for the classes of tasks with these routes and text features."""
        probes = [self._of(route[-1]) if route else None for route in routes]
        parts = [
            (text, text.new_zeros(len(text))) if probe is None else probe(text)
            for probe, text in zip(probes, text_features)
        ]
        return torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])

    def check(self, routes: Mapping[str, Route]) -> None:
        """Raise a `ValueError` if a task, given with its route by name, should have a probe but has no own adapter."""
        for name, route in routes.items():
            if self.scale is not None and route[-1:] and route[-1] not in self.class_counts:
                raise ValueError(
                    f"probe=True gives a task a classifier in its own adapter, but task {name!r} uses only "
                    f"{', '.join(route)}; write sharing='none', or sharing='groups' with grouping='all' for one group "
                    "of all tasks. Without a MultiTaskTrainer, write classifier.separate_adapters() first."
                )

    def _new(self, adapter: str, device: torch.device | str) -> TextProbe | None:
        if self.scale is None or adapter not in self.class_counts:
            return None
        return TextProbe(self.class_counts[adapter], self.dim, self.scale, device)

    def _of(self, adapter: str) -> TextProbe | None:
        return self.probes._modules.get(bracketed(adapter))


def _named(probe: TextProbe | None) -> dict[str, nn.Parameter]:
    return {} if probe is None else {f"{PREFIX}{name}": each for name, each in probe.named_parameters()}

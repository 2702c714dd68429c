"""The average of the adapters over the epochs, with Gaussian weights, as in PromptSRC."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from .description import check_shapes
from .files import read_tensors
from .task_adapters import TaskAdapters


LAST_FILE = "last_adapters.safetensors"  # in checkpoints with an average: the adapters that training goes on with


def epoch_weights(epochs: int, mean: float, std: float) -> list[float]:
    r"""The weight of each epoch $e$ = 1 ... `epochs`, $\exp(-(e - \mu)^2 / 2 \sigma^2)$ scaled to a sum of 1, where
    $\mu$ = `mean` and $\sigma$ = `std` are in epochs."""
    logs = [-0.5 * ((epoch - mean) / std) ** 2 for epoch in range(1, epochs + 1)]
    weights = [math.exp(each - max(logs)) for each in logs]  # so that not all of them are rounded to 0
    return [weight / sum(weights) for weight in weights]


class AdapterAverage:
    r"""The running average of the adapters that train, after each epoch:

    $$\bar P_E = \sum_{e=1}^E w_e P_e, \qquad w_e = \frac{g(e)}{\sum_{a=1}^E g(a)}, \qquad
    g(e) = \exp \left( -\frac{(e - \mu N)^2}{2 (\sigma N)^2} \right)$$

    with $P_e$ the adapters' parameters after epoch $e$ of $N$, $\mu$ = `mean` and $\sigma$ = `std`. After the last
    epoch it is that of PromptSRC (Khattak et al., ICCV 2023, equation 6); before, the weights are scaled to a sum of
    1, so that training can be evaluated, saved or ended at any time (a choice of this library).

    It is kept in the parameters' own dtype, since it is what adapter files hold.

    Args:
        classifier (`TaskAdapters`): the classifier.
        mean, std (`float`): of the Gaussian, as shares of the epochs. A mean of 0: no average.
    """

    def __init__(self, classifier: TaskAdapters, mean: float, std: float) -> None:
        self.classifier, self.mean, self.std = classifier, mean, std
        self.values: dict[str, torch.Tensor] = {}
        self.last: dict[str, torch.Tensor] | None = None  # while the adapters hold the average: what they held before

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by the name of their adapter and their own."""
        return {
            f"{adapter}.{name}": parameter
            for adapter in self.classifier.training_adapters
            for name, parameter in self.classifier.adapter_parameters(adapter).items()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def add(self, epoch: int, epochs: int) -> None:
        """Add the adapters as they are after epoch `epoch` (from 1) of `epochs`."""
        if not self.mean:
            return
        share = epoch_weights(epoch, self.mean * epochs, self.std * epochs)[-1]
        for name, parameter in self.parameters().items():
            value = parameter.detach().clone()
            self.values[name] = self.values[name].lerp(value, share) if name in self.values else value

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside the `with` block the adapters hold the average, if there is one."""
        if not self.values or self.last is not None:
            yield
            return
        self.last = {name: parameter.detach().clone() for name, parameter in self.parameters().items()}
        try:
            self._write(self.values)
            yield
        finally:
            self._write(self.last)
            self.last = None

    def finish(self) -> None:
        """Give the adapters the average for good, if there is one."""
        self._write(self.values)
        self.values = {}

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        parameters = self.parameters()
        for name, value in values.items():
            parameters[name].copy_(value)

    def save(self, folder: Path) -> None:
        """Write the adapters that training goes on with, while the adapters hold the average."""
        if self.last is not None:
            save_file({name: value.contiguous() for name, value in self.last.items()}, folder / LAST_FILE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint whose adapters, those of the average, are loaded.

        Raises:
            ValueError: the file is damaged, or of other adapters than those that train.
        """
        self.values = {}
        if (folder / LAST_FILE).exists():
            parameters, last = self.parameters(), read_tensors(folder / LAST_FILE)
            check_shapes(last, parameters, folder / LAST_FILE)
            if self.mean:
                self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            self._write(last)

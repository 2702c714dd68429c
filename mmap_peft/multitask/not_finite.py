"""Notices losses and gradients that are not finite, without waiting for the device at each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch


NEVER = 2**62


class NotFinite:
    """The first step at which the loss of each task, or the gradient, was not finite, kept on the device."""

    def __init__(self) -> None:
        self._losses: torch.Tensor | None = None  # (tasks,), numbers of steps
        self._gradient: torch.Tensor | None = None  # (), the same

    def add_losses(self, losses: torch.Tensor, step: int) -> None:
        """Remember the losses of all tasks, (tasks,)."""
        self._losses = _first(self._losses, losses.detach(), step)

    def add_gradient(self, norm: torch.Tensor | float, step: int, device: torch.device) -> None:
        """Remember the norm of the gradient."""
        norm = norm.to(device) if isinstance(norm, torch.Tensor) else torch.full((), norm, device=device)
        self._gradient = _first(self._gradient, norm, step)

    def check(self, tasks: Sequence[str]) -> None:
        """Raise a `ValueError` if a value was not finite since the last call. The error names the tasks."""
        losses, gradient = (
            [] if each is None else each.reshape(-1).tolist() for each in (self._losses, self._gradient)
        )
        self._losses = self._gradient = None
        step = min([*losses, *gradient], default=NEVER)
        if step == NEVER:
            return
        names = ", ".join(name for name, first in zip(tasks, losses) if first == step)
        what = (
            f"The loss is not finite at step {step}, from task {names[:200]}"
            if names
            else (f"The gradient is not finite at step {step}, though the loss is")
        )
        raise ValueError(
            f"{what}; lower learning_rate, or look for images or weights that are not finite. Nothing was saved "
            "since; resume from the last checkpoint."
        )


def _first(before: torch.Tensor | None, values: torch.Tensor, step: int) -> torch.Tensor:
    now = torch.full(values.shape, NEVER, device=values.device).masked_fill(~values.isfinite(), step)
    return now if before is None else torch.minimum(before, now)

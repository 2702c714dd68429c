"""How the gradients of several tasks become one for the parameters that they share."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn


def find_aggregator(name: str) -> nn.Module:
    """An aggregator of `torchjd.aggregation` with its defaults.

    Args:
        name (`str`): for example `"PCGrad"`, `"CAGrad"`, `"MGDA"` or `"UPGrad"`; `"CAGrad(c=0.5)"` with settings.

    Raises:
        ImportError: torchjd is not installed.
        ValueError: torchjd has no such aggregator, or it needs other settings.
    """
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(
            f"aggregator={name!r} needs the package torchjd, which is not there; write "
            "pip install mmap_peft[aggregation]."
        ) from error
    kind, _, settings = name.removesuffix(")").partition("(")
    known = {
        found: made
        for found, made in vars(aggregation).items()
        if inspect.isclass(made) and issubclass(made, aggregation.Aggregator) and made is not aggregation.Aggregator
    }
    if kind not in known:
        raise ValueError(f"aggregator={name!r} is none of torchjd's; write one of {', '.join(sorted(known))}.")
    try:
        pairs = [pair.split("=") for pair in settings.split(",") if pair]
        return known[kind](**{key.strip(): float(value) for key, value in pairs})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"aggregator={name!r} cannot be made ({error}); write its settings as in 'CAGrad(c=0.5)'."
        ) from error


def backward(
    losses: Sequence[torch.Tensor], users: dict[nn.Parameter, list[int]], aggregator: nn.Module | None = None
) -> None:
    r"""Add to each parameter's `.grad` what an aggregator makes of its tasks' gradients.

    With $g_i$ the gradient of task $i$'s loss by the parameters that the same tasks share, flattened to the rows of a
    Jacobian $J$, their gradient is $\mathcal A(J)$. A parameter of one task gets the gradient of that task. With the
    sum, $\mathcal A(J) = \sum_i g_i$, this is what `sum(losses).backward()` does.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, and `torchjd`.

    Args:
        losses: one of each task.
        users: for each parameter the numbers of the tasks that use it.
        aggregator: of `torchjd`: a matrix (tasks, elements) in, a vector (elements) out.
    """
    together: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter, tasks in users.items():
        together.setdefault(tuple(tasks), []).append(parameter)
    rows: dict[tuple[int, ...], list[torch.Tensor]] = {tasks: [] for tasks in together}
    for number, loss in enumerate(losses):
        mine = [(tasks, parameters) for tasks, parameters in together.items() if number in tasks]
        flat = [parameter for _, parameters in mine for parameter in parameters]
        if not flat:
            continue
        found = torch.autograd.grad(loss, flat, retain_graph=number + 1 < len(losses), materialize_grads=True)
        parts = iter(found)
        for tasks, parameters in mine:
            rows[tasks].append(torch.cat([next(parts).flatten() for _ in parameters]))
    for tasks, parameters in together.items():
        if not tasks:
            continue
        matrix = torch.stack(rows[tasks])
        joined = matrix.sum(dim=0) if aggregator is None or len(tasks) == 1 else aggregator(matrix)
        for parameter, part in zip(parameters, joined.split([parameter.numel() for parameter in parameters])):
            part = part.view_as(parameter)
            parameter.grad = part if parameter.grad is None else parameter.grad + part

"""Aggregating the gradients of several tasks for the parameters that they share."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..tuner.devices import on_device


def find_aggregator(text: str, smallest: int = 1) -> nn.Module:
    """An aggregator of `torchjd.aggregation`, with the settings that are written with it.

    Args:
        text (`str`): its name, such as `"PCGrad"`, `"MGDA"` or `"UPGrad"`, with settings as in `"CAGrad(c=0.5)"`,
            `"Krum(n_byzantine=1)"` or `"Constant(weights=[0.7, 0.2, 0.1])"`. A list becomes a tensor.
        smallest (`int`): smallest number of tasks whose gradients it must aggregate; with 1, this is not checked.

    Raises:
        ImportError: torchjd, or a package that this aggregator needs, is not installed.
        ValueError: torchjd has no such aggregator, its settings are wrong, it keeps a state that checkpoints do not
            hold, or it cannot aggregate the gradients of so few tasks.
    """
    try:
        from torchjd import aggregation

        names = [name for name in aggregation.__all__ if not name.endswith(("Weighting", "Aggregator"))]
        name = text.partition("(")[0]
        if name not in names:
            raise ValueError(f"aggregator={text!r} is none of torchjd's; write one of {', '.join(sorted(names))}.")
        if hasattr(getattr(aggregation, name), "reset"):
            raise ValueError(
                f"aggregator={text!r} keeps a state from one step to the next, which checkpoints do not hold, so "
                "training could not be resumed; write an aggregator without a state, such as 'PCGrad' or 'UPGrad'."
            )
        aggregator = _make(getattr(aggregation, name), text)
    except ImportError as error:
        raise ImportError(f"aggregator={text!r}: {error}; write pip install mmap_peft[aggregation].") from error
    try:
        if smallest > 1:
            with torch.random.fork_rng(devices=[]):
                aggregator(torch.eye(smallest))
    except Exception as error:
        raise ValueError(
            f"aggregator={text!r} cannot aggregate the gradients of {smallest} tasks ({error}); write another "
            "aggregator or other settings. With sharing='groups' a group can be as small as two tasks; with "
            "sharing='all' the gradients are always those of all tasks."
        ) from error
    return aggregator


def _make(kind: Callable[..., nn.Module], text: str) -> nn.Module:
    """An aggregator with the settings of `"Name(key=value, ...)"`."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Name | ast.Call) or not isinstance(getattr(call, "func", call), ast.Name):
            raise ValueError("it is more than a name with settings")
        if getattr(call, "args", None):
            raise ValueError("settings need names")
        settings: dict[str, Any] = {each.arg: ast.literal_eval(each.value) for each in getattr(call, "keywords", [])}
        return kind(
            **{key: torch.tensor(value) if isinstance(value, list) else value for key, value in settings.items()}
        )
    except ImportError:
        raise
    except Exception as error:  # aggregators raise different exceptions for wrong settings
        raise ValueError(
            f"aggregator={text!r} cannot be made ({error}); write its settings as in 'CAGrad(c=0.5)'."
        ) from error


def backward_passes(tasks_by_parameter: Mapping[nn.Parameter, Sequence[int]]) -> list[list[int]]:
    """The tasks of each backward pass that `add_task_gradients` takes: tasks that share no parameter take one
    together. With disjoint groups these are as many passes as the largest group has tasks."""
    users = sorted({tuple(sorted(tasks)) for tasks in tasks_by_parameter.values()})
    passes: list[list[int]] = []
    for task in sorted({task for tasks in users for task in tasks}):
        others = {other for tasks in users if task in tasks for other in tasks}
        free = next((tasks for tasks in passes if not others.intersection(tasks)), None)
        if free is None:
            passes.append(free := [])
        free.append(task)
    return passes


def add_task_gradients(losses: torch.Tensor, tasks_by_parameter: Mapping[nn.Parameter, Sequence[int]]) -> None:
    """Add the gradients of the tasks' losses, (all tasks,), to the `.jac` of each parameter, which has a row for each
    task that uses the parameter, in their order.

    The gradient of the sum of several losses by a parameter is that of the only one that depends on it. So tasks that
    share no parameter take one backward pass together, and the result equals that of a pass for each task. Memory does
    not grow with the number of passes.

    Args:
        losses (`torch.Tensor`): (all tasks,).
        tasks_by_parameter: for each parameter the numbers of the tasks that use it.
    """
    used = {parameter: list(tasks) for parameter, tasks in tasks_by_parameter.items() if tasks}
    for parameter, tasks in used.items():
        if not hasattr(parameter, "jac"):
            parameter.jac = parameter.new_zeros(len(tasks), *parameter.shape)
    passes = backward_passes(used)
    for number, tasks in enumerate(passes, start=1):
        chosen = torch.zeros_like(losses).index_fill(0, on_device(tasks, losses.device), 1)
        retain = number < len(passes)
        gradients = torch.autograd.grad(losses, list(used), chosen, retain_graph=retain, allow_unused=True)
        for (parameter, users), gradient in zip(used.items(), gradients):
            for task in set(users).intersection(tasks) if gradient is not None else ():  # at most one
                parameter.jac[users.index(task)] += gradient


def aggregate_task_gradients(
    tasks_by_parameter: dict[nn.Parameter, list[int]],
    aggregator: nn.Module,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda matrix: matrix,
) -> None:
    r"""Aggregate the task gradients in each parameter's `.jac` into its `.grad`, and delete the `.jac`.

    With $g_i$ the gradient of task $i$'s loss by the parameters that the same tasks share, flattened to the rows of a
    Jacobian $J$, their gradient is $\mathcal A(J)$; with the sum, $\sum_i g_i$, that of `losses.sum().backward()`. A
    parameter of one task gets the gradient of that task. Since an aggregator is not linear, it is called once for each
    optimizer step, with the gradients of all accumulated batches and all processes.

    Source: Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, and `torchjd`.

    Args:
        tasks_by_parameter: as for `add_task_gradients`.
        aggregator: of `torchjd`: a matrix (tasks, elements) in, a vector (elements) out.
        reduce: returns the mean of a tensor over all processes.
    """
    from torchjd import aggregation, autojac

    parameters_by_tasks: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter, tasks in tasks_by_parameter.items():
        if tasks:
            parameter.jac = reduce(parameter.jac)
            parameters_by_tasks.setdefault(tuple(tasks), []).append(parameter)
    for tasks, parameters in parameters_by_tasks.items():
        autojac.jac_to_grad(parameters, aggregator if len(tasks) > 1 else aggregation.Sum())
    drop_task_gradients(tasks_by_parameter)


def drop_task_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Delete the `.jac` of parameters, such as one that an interrupted training left."""
    for parameter in parameters:
        vars(parameter).pop("jac", None)

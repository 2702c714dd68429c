"""Gradients of each task's loss with respect to prompts that the tasks share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..tuner.assemble import AdapterPrompts, Route
from .classifier import MultiTaskClassifier
from .images import IGNORE_INDEX
from .output import task_losses
from .processes import is_sharded


def task_gradients(
    classifier: MultiTaskClassifier,
    adapter: str,
    batches: Iterable[dict[str, torch.Tensor]],
    tasks: Sequence[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of each task's summed loss with respect to an adapter that tasks share, and these losses.

    The result equals that of a backward pass for each task. Each task uses its own copy of the prompts, so one forward
    and one backward pass over a batch give the gradients of all tasks with respect to their copies. At the end, one
    small backward pass through the generator gives those with respect to the adapter's parameters. The texts are
    encoded once for all batches. Tasks with the same texts share this forward pass, but not its backward pass.

    The classifier is not changed (`.grad`, training mode, routes), and no random number is drawn.

    Args:
        classifier (`MultiTaskClassifier`): a classifier whose adapters are prompts.
        adapter (`str`): name of the adapter.
        batches: batches of `TaskImages`, with images of these tasks.
        tasks (`Sequence[str]`, *optional*): names of the tasks; all of them if not given. Memory grows with them.

    Returns:
        The gradients, (tasks, elements of the adapter's parameters), float64, and the losses, (tasks,), float64; both
        are zero for a task without images.
    """
    names = list(classifier.tasks if tasks is None else tasks)
    with torch.enable_grad(), classifier.evaluating():  # without dropout, which draws random numbers
        prompts, copies, given, routes = _copies(classifier, adapter, names)
        # A sharded tower runs inside the whole forward pass only, so there it encodes the texts for each batch.
        keys = [] if is_sharded(classifier) else classifier.text_keys(names, trained_only=True)
        owners = [keys.index(key) for key in keys]  # for each task, the first task with the same texts
        features: list[torch.Tensor] = []
        if owners:
            shared = {task: routes[names[owner]] for task, owner in zip(names, owners)}
            with classifier.override_routes({**classifier.current_routes, **shared}):
                features = classifier.encode_texts(names, given, trained_only=True)
        texts = {name: part.detach().requires_grad_() for name, part in zip(names, features)}
        leaves = [*texts.values(), *copies]
        with classifier.override_routes({**classifier.current_routes, **routes}):
            sums, losses = _sums(classifier, batches, texts, given, leaves)
        by_texts, by_copies = sums[: len(features)], sums[len(features) :]
        if features and features[0].requires_grad:
            _back_through_texts(features, by_texts, owners, copies, by_copies)
        gradients = _pull_back(prompts, list(classifier.adapter_parameters(adapter).values()), by_copies)
    return gradients, losses[[list(classifier.tasks).index(name) for name in names]].to(gradients.device)


def _sums(
    classifier: MultiTaskClassifier,
    batches: Iterable[dict[str, torch.Tensor]],
    texts: dict[str, torch.Tensor],
    given: dict[str, AdapterPrompts],
    leaves: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients of the loss of all images with respect to `leaves`, and the loss of each of the classifier's tasks."""
    sums = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
    losses = torch.zeros(len(classifier.tasks), dtype=torch.float64)
    for batch in batches:
        batch = {name: part.to(classifier.device) if hasattr(part, "to") else part for name, part in batch.items()}
        output = classifier(**batch, text_features=texts, given=given, trained_only=True)
        labels = batch["labels"]
        images = (labels != IGNORE_INDEX).sum()
        parts = task_losses(output.logits.detach(), labels, batch["task_ids"], len(losses)) * images
        losses += parts.double().cpu()
        for total, part in zip(sums, torch.autograd.grad(output.loss * images, leaves, materialize_grads=True)):
            total += part
    return sums, losses


def _copies(
    classifier: MultiTaskClassifier, adapter: str, tasks: Sequence[str]
) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, AdapterPrompts], dict[str, Route]]:
    """Copies of an adapter's prompts for each task.

    Returns the prompts of each tower, their copies as leaves, (tasks, ...), the copies as `given` prompts by name, and
    for each task its route with its copy in place of the adapter.
    """
    names = {task: f"{adapter}/{number}" for number, task in enumerate(tasks)}  # no adapter's name
    prompts = classifier.adapter_set.prompts_of(adapter)
    copies = [torch.stack([part.detach()] * len(names)).requires_grad_() for part in prompts.towers.values()]
    given = {
        name: prompts._replace(towers=dict(zip(prompts.towers, parts)))
        for name, *parts in zip(names.values(), *copies)
    }
    routes = {
        task: tuple(name if part == adapter else part for part in classifier.current_routes[task])
        for task, name in names.items()
    }
    return list(prompts.towers.values()), copies, given, routes


def _back_through_texts(
    features: Sequence[torch.Tensor],
    by_texts: Sequence[torch.Tensor],
    owners: Sequence[int],
    copies: Sequence[torch.Tensor],
    by_copies: Sequence[torch.Tensor],
) -> None:
    """Add to `by_copies`, the gradients with respect to the copies, (tasks, ...), the part through the text features.

    `by_texts` are the gradients with respect to each task's features; `owners` are the tasks whose copies made them.
    """
    turns = [owners[:number].count(owner) for number, owner in enumerate(owners)]
    for turn in range(max(turns) + 1):  # a turn has at most one of the tasks with the same texts
        tasks = [number for number, task_turn in enumerate(turns) if task_turn == turn]
        ends, back = zip(*((features[task], by_texts[task].to(features[task].dtype)) for task in tasks))
        parts = torch.autograd.grad(ends, copies, back, retain_graph=turn < max(turns), materialize_grads=True)
        for total, part in zip(by_copies, parts):
            total[tasks] += part[[owners[task] for task in tasks]]


def _pull_back(
    prompts: list[torch.Tensor], parameters: list[torch.Tensor], by_copies: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Gradients with respect to the adapter's parameters, from those with respect to the copies of its prompts."""
    by_copies = [part.to(prompt.dtype) for part, prompt in zip(by_copies, prompts)]
    # One batched backward pass for all tasks, which are the first dimension.
    parts = torch.autograd.grad(prompts, parameters, by_copies, is_grads_batched=True, allow_unused=True)
    tasks = len(by_copies[0])
    parts = [
        parameter.new_zeros(tasks, *parameter.shape) if part is None else part
        for part, parameter in zip(parts, parameters)
    ]
    return torch.cat([part.reshape(tasks, -1) for part in parts], dim=1).double()

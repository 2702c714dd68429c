"""How alike the tasks are: cosines of their gradients with respect to shared prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from .classifier import MultiTaskClassifier
from .images import IGNORE_INDEX
from .processes import is_sharded


def task_gradients(
    classifier: MultiTaskClassifier, adapter: str, batches: Iterable[dict[str, torch.Tensor]]
) -> torch.Tensor:
    """Gradient of each task's summed loss with respect to an adapter that tasks share.

    Each task gets a copy of the prompts. So one forward and one backward pass a batch give the gradients of all tasks
    by their copies, and one small backward pass in the end, through what makes the prompts, those by the adapter's
    parameters. The texts pass the text tower once, whatever the number of batches; tasks of the same texts share that
    pass, and go back through it one by one. Equal to a backward pass a task.

    Nothing is left behind: no `.grad`, no changed mode or route, no drawn random number.

    Args:
        classifier (`MultiTaskClassifier`): whose adapters are prompts.
        adapter (`str`): name of the adapter.
        batches: batches of `TaskImages`, of any tasks.

    Returns:
        (tasks, elements of the adapter's parameters), float64; zero for a task without images.
    """
    copies = _PromptCopies(classifier, adapter)
    names, routes = list(classifier.tasks), classifier.current_routes

    def override(used: Sequence[str]) -> AbstractContextManager[None]:
        return classifier.override_routes(
            {
                name: tuple(copy if part == adapter else part for part in routes[name])
                for name, copy in zip(names, used)
            }
        )

    # No dropout, so that no random number is drawn.
    with torch.enable_grad(), classifier.evaluating():
        # A sharded tower runs within a whole forward pass only: there it does so for each batch.
        keys = [] if is_sharded(classifier) else classifier.text_keys(names)
        owners = [keys.index(key) for key in keys]  # whose copy tasks of the same texts use for them
        features: list[torch.Tensor] = []
        if owners:
            with override([copies.names[owner] for owner in owners]):
                features = classifier.encode_texts(names, copies.given)
        texts = {name: part.detach().requires_grad_() for name, part in zip(names, features)}
        leaves = [*texts.values(), *copies.leaves]
        sums = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
        with override(copies.names):
            for batch in batches:
                batch = {name: tensor.to(classifier.device) for name, tensor in batch.items()}
                loss = classifier(**batch, text_features=texts, given=copies.given).loss
                loss = loss * (batch["labels"] != IGNORE_INDEX).sum()
                _add(sums, torch.autograd.grad(loss, leaves, materialize_grads=True))
        by_texts, by_prompts = sums[: len(features)], sums[len(features) :]
        if features and features[0].requires_grad:
            _back_through_texts(features, by_texts, owners, copies.leaves, by_prompts)
        return copies.pull_back(by_prompts).double()


class _PromptCopies:
    """A copy of an adapter's prompts for each task, which are leaves: one backward pass gives the gradient of each."""

    def __init__(self, classifier: MultiTaskClassifier, adapter: str) -> None:
        container, count = classifier.adapter_set.container, len(classifier.tasks)
        self.parameters = list(classifier.adapter_parameters(adapter).values())
        with torch.enable_grad():
            prompts = container.adapter_prompts(adapter, list(container.mmap_generators[adapter].depths))
        self.prompts = list(prompts.towers.values())
        self.leaves = [torch.stack([part.detach()] * count).requires_grad_() for part in self.prompts]
        self.names = [f"{adapter}/{number}" for number in range(count)]  # no adapter may be called so
        self.given = {
            name: prompts._replace(towers=dict(zip(prompts.towers, parts)))
            for name, *parts in zip(self.names, *self.leaves)
        }

    def pull_back(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """From gradients by `leaves` to those by the adapter's parameters, (tasks, elements), through its generator
        alone. Works once."""
        gradients = [part.to(prompts.dtype) for part, prompts in zip(gradients, self.prompts)]
        # All tasks in one backward pass, which the parts' first dimension makes many of.
        parts = torch.autograd.grad(self.prompts, self.parameters, gradients, is_grads_batched=True, allow_unused=True)
        count = len(self.names)
        parts = [
            parameter.new_zeros(count, parameter.numel()) if part is None else part.reshape(count, -1)
            for part, parameter in zip(parts, self.parameters)
        ]
        return torch.cat(parts, dim=1)


def _back_through_texts(
    features: Sequence[torch.Tensor],
    by_texts: Sequence[torch.Tensor],
    owners: Sequence[int],
    leaves: Sequence[torch.Tensor],
    by_prompts: Sequence[torch.Tensor],
) -> None:
    """Add the gradients that come by way of text features to those by the prompts of each task.

    Args:
        features: of each task; `owners` says whose prompts they were made with.
        by_texts: gradients by them.
        leaves, by_prompts: (tasks, ...), the prompts and where their gradients are added.
    """
    turns = [owners[:number].count(owner) for number, owner in enumerate(owners)]
    for turn in range(max(turns) + 1):  # in each, one task of each kind of texts
        tasks = [number for number, other in enumerate(turns) if other == turn]
        ends, back = zip(*((features[task], by_texts[task].to(features[task].dtype)) for task in tasks))
        parts = torch.autograd.grad(ends, leaves, back, retain_graph=turn < max(turns), materialize_grads=True)
        for total, part in zip(by_prompts, parts):
            total[tasks] += part[[owners[task] for task in tasks]]


def _add(sums: Sequence[torch.Tensor], parts: Sequence[torch.Tensor]) -> None:
    for total, part in zip(sums, parts):
        total += part


def cosine_similarity(gradients: torch.Tensor, tasks: Sequence[str]) -> np.ndarray:
    """Cosines of all pairs of gradients.

    Args:
        gradients (`torch.Tensor`): (tasks, elements).
        tasks (`Sequence[str]`): their names, for the error.

    Returns:
        (tasks, tasks), symmetric, with ones on the diagonal.

    Raises:
        ValueError: a task's gradient is zero or not finite, so that it has no direction.
    """
    norms = gradients.norm(dim=1)
    for name, norm in zip(tasks, norms.tolist()):
        if not 0 < norm < float("inf"):
            raise ValueError(
                f"The gradient of task {name!r} has the norm {norm}, so its similarity to other tasks is unknown; see "
                "that it has training images, that its prompts are trained, and that its loss is finite."
            )
    unit = gradients / norms[:, None]
    similarity = (unit @ unit.T).clamp(-1, 1).cpu().numpy()
    np.fill_diagonal(similarity, 1.0)
    return (similarity + similarity.T) / 2

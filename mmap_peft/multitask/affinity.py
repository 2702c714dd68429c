"""How alike the tasks are: cosines of their gradients with respect to shared prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..tuner.copies import prompt_copies
from ..tuner.routing import Route
from .classifier import MultiTaskClassifier
from .images import IGNORED
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
    parameters = list(classifier.adapter_parameters(adapter).values())
    names, clip = list(classifier.tasks), classifier.clip
    # No dropout, so that no random number is drawn.
    with torch.enable_grad(), classifier.evaluating(), prompt_copies(clip, adapter, len(names)) as copies:

        def routes(used: Sequence[str]) -> dict[str, Route]:
            return {
                name: tuple(copy if part == adapter else part for part in classifier.routes[name])
                for name, copy in zip(names, used)
            }

        # A sharded tower runs within a whole forward pass only: there it does so for each batch.
        alike = [] if is_sharded(classifier) else classifier.alike_texts(names)
        owners = [alike.index(key) for key in alike]  # whose copy tasks of the same texts use for them
        with classifier.rerouted(routes([copies.names[owner] for owner in owners])):
            features = classifier.encode_texts(names) if owners else []
        with classifier.rerouted(routes(copies.names)) as texts:
            texts.update({name: part.detach().requires_grad_() for name, part in zip(names, features)})
            leaves = [*texts.values(), *copies.leaves]
            sums = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
            for batch in batches:
                batch = {name: tensor.to(classifier.device) for name, tensor in batch.items()}
                loss = classifier(**batch).loss * (batch["labels"] != IGNORED).sum()
                _add(sums, torch.autograd.grad(loss, leaves, materialize_grads=True))
        by_texts, by_prompts = sums[: len(features)], sums[len(features) :]
        if features and features[0].requires_grad:
            turns = [owners[:number].count(owner) for number, owner in enumerate(owners)]
            for turn in range(max(turns) + 1):  # in each, one task of each kind of texts
                tasks = [number for number, other in enumerate(turns) if other == turn]
                ends, back = zip(*((features[task], by_texts[task].to(features[task].dtype)) for task in tasks))
                found = torch.autograd.grad(ends, copies.leaves, back, turn < max(turns), materialize_grads=True)
                for total, part in zip(by_prompts, found):
                    total[tasks] += part[[owners[task] for task in tasks]]
        return copies.pull_back(by_prompts, parameters).double()


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

"""How alike the tasks are: cosines of their gradients with respect to shared prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import nn

from .classifier import MultiTaskClassifier
from .images import IGNORED


def task_gradients(
    classifier: MultiTaskClassifier,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[dict[str, torch.Tensor]],
) -> torch.Tensor:
    """Gradient of each task's summed loss with respect to parameters that all tasks share.

    Nothing is left behind: no `.grad`, no changed mode, no drawn random number.

    Args:
        classifier (`MultiTaskClassifier`): whose tasks all use `parameters`.
        parameters (`Sequence[nn.Parameter]`): what to differentiate by.
        batches: batches of `TaskImages`; each holds images of one task.

    Returns:
        (tasks, elements of all parameters), float64; zero for a task without images.
    """
    size = sum(parameter.numel() for parameter in parameters)
    gradients = torch.zeros(len(classifier.tasks), size, dtype=torch.float64, device=classifier.device)
    training = classifier.training
    classifier.eval()  # no dropout, so that no random number is drawn
    try:
        for batch in batches:
            batch = {name: tensor.to(classifier.device) for name, tensor in batch.items()}
            with torch.enable_grad():
                loss = classifier(**batch).loss * (batch["labels"] != IGNORED).sum()
                parts = torch.autograd.grad(loss, parameters, allow_unused=True)
            flat = [
                (torch.zeros_like(parameter) if part is None else part).flatten()
                for part, parameter in zip(parts, parameters)
            ]
            gradients[batch["task_ids"][0]] += torch.cat(flat).double()
    finally:
        classifier.train(training)
    return gradients


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

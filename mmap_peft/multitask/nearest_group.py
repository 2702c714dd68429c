"""Which group's prompts fit a new task best, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from ..tuner.assemble import Route
from .images import IGNORE_INDEX, TaskImages
from .processes import is_sharded
from .task import Task


MOST_IMAGES = 512  # of the new task
BATCH = 64
DRAWS = 1000


class NearestGroup(NamedTuple):
    """The group whose prompts fit a new task best.

    Attributes:
        group: its name, such as `"group_0"`.
        probability: share of bootstrap draws of the task's training images in which this group has the smallest loss:
            how sure the choice is.
        losses: for each group by its name, the mean loss of the training images with its prompts.
    """

    group: str
    probability: float
    losses: dict[str, float]


@torch.no_grad()
def nearest_group(classifier: Any, task: Task, routes: Mapping[str, Route], seed: int = 0) -> NearestGroup:
    """The group with the smallest loss of a task's training images, at most 512 of them, as in training: a softmax
    over the classes that are trained.

    Args:
        classifier (`MultiTaskClassifier`): the classifier, which is not changed.
        task (`Task`): a task with training images, that need not be one of the classifier's.
        routes: for each group by its name, the adapters that its tasks share.
        seed (`int`): seed of the choice of images and of the bootstrap.

    Raises:
        ValueError: the task has no training images, or none that can be read; the base is sharded.
    """
    task.check_training_images()
    if is_sharded(classifier):
        raise ValueError(
            "The nearest group cannot be found while FSDP shards the base; save the classifier, load it in one "
            "process, and call add_task there."
        )
    rng = np.random.default_rng(seed)
    images = TaskImages([task], "train", classifier.processor.image_processor, "skip", None, 0)
    chosen = rng.permutation(len(images))[:MOST_IMAGES]
    parts: dict[str, list[torch.Tensor]] = {group: [] for group in routes}
    with classifier.evaluating():
        trained = task.with_classes(task.trained_classes)
        texts = {group: classifier.texts_of(trained, route) for group, route in routes.items()}
        place = torch.full((len(task.class_names),), IGNORE_INDEX, device=classifier.device)
        place[task.trained_numbers] = torch.arange(len(trained.class_names), device=place.device)
        for batch in images.batches(chosen, BATCH, "Nearest group"):
            pixels, labels = batch["pixel_values"].to(classifier.device), batch["labels"].to(classifier.device)
            labels = torch.where(labels == IGNORE_INDEX, labels, place[labels.clamp(min=0)])
            numbers = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
            for group, route in routes.items():
                features = classifier.image_features(pixels, [route], numbers)
                logits = classifier.logit_scale() * features.to(texts[group].dtype) @ texts[group].T
                parts[group].append(F.cross_entropy(logits.float(), labels, reduction="none")[labels != IGNORE_INDEX])
    losses = torch.stack([torch.cat(part) for part in parts.values()]).double().cpu().numpy()  # (groups, images)
    if not losses.size:
        raise ValueError(f"No training image of task {task.name!r} can be read; give it images that can.")
    if not np.isfinite(losses).all():
        raise ValueError(f"The losses of task {task.name!r} with the prompts of the groups are not finite.")
    return smallest(losses, list(routes), rng)


def smallest(losses: np.ndarray, groups: Sequence[str], rng: np.random.Generator) -> NearestGroup:
    """The group with the smallest mean loss, given the losses of all images, (groups, images)."""
    means, count = losses.mean(axis=1), losses.shape[1]
    weights = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS)
    share = float(((weights @ losses.T).argmin(axis=1) == means.argmin()).mean())
    return NearestGroup(groups[int(means.argmin())], share, dict(zip(groups, means.tolist())))

"""Validation images, taken from the training images."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Dataset

from .splits import Split, make_tasks, split_at_random


def hold_out(
    domains: Mapping[str, Dataset], split: Split, share: float, seed: int = 0
) -> tuple[dict[str, Dataset], Split]:
    """Choose random training images of each class of each domain to validate on; no image of `split.eval` is used.

    Args:
        domains: data sets with the columns `image`, `label` and `file`.
        split: which of their images train.
        share: of the training images of each class; the others train.
        seed: seed of the choice.

    Returns:
        The training images, by the names of the tasks, and the split of them, for `make_tasks`.

    Raises:
        ValueError: as for `split_at_random`, or a task has only one training image of each class.
    """
    training_only = Split(split.train, {name: [] for name in split.train}, split.source)
    images = {task.name: task.train for task in make_tasks(domains, training_only)}
    inner = split_at_random(images, fraction=1 - share, seed=seed)
    empty = [name for name, files in inner.eval.items() if not files]
    if empty:
        raise ValueError(
            f"Task {empty[0]!r} has one training image of each class, so none is left to validate on; take more "
            "shots or a larger fraction."
        )
    return images, inner

"""The order of the training images of all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


def interleave(shares: np.ndarray, rows: int) -> np.ndarray:
    """Task numbers, (rows,), such that among the first n rows, for any n, each task has its share to within two rows.

    Args:
        shares (`np.ndarray`): (tasks,), the share of each task; they add up to 1.
        rows (`int`): number of rows.
    """
    seen, order = np.zeros(len(shares)), np.empty(rows, dtype=np.int64)
    for row in range(rows):
        order[row] = np.argmax(shares * (row + 1) - seen)
        seen[order[row]] += 1
    return order


class TaskSampler(Sampler[int]):
    """The order of one epoch's images, in which all tasks alternate.

    Batches are consecutive parts of this order, so every batch of every process holds every task. A step uses the same
    images as one large batch, as several accumulated batches, or on several processes. The order depends only on seed
    and epoch. An epoch consists of complete steps.

    Args:
        sizes (`Sequence[int]`): number of images of each task. Images are numbered task by task.
        batch_size (`int`): images of one batch on one process.
        batches_per_step (`int`): batches of one optimizer step, counted over all processes and accumulated batches.
        sampling (`str`): share of each task in a batch: `"uniform"`, the same for each task that has images, so that
            images of small tasks are repeated, or `"proportional"` to its number of images.
        seed (`int`): seed of the order.

    Attributes:
        steps (`int`): optimizer steps of one epoch.

    Raises:
        ValueError: `batch_size` is too small to hold every task.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        batches_per_step: int = 1,
        sampling: str = "uniform",
        seed: int = 0,
    ) -> None:
        if sampling not in ("uniform", "proportional"):
            raise ValueError(f"sampling={sampling!r} is no choice; write 'uniform' or 'proportional'.")
        self.sizes, self.seed, self.epoch = list(sizes), seed, 0
        self.steps = max(sum(sizes) // (batch_size * batches_per_step), 1)
        weights = np.minimum(sizes, 1) if sampling == "uniform" else np.array(sizes)
        self.order = interleave(weights / weights.sum(), self.steps * batch_size * batches_per_step)
        tasks = np.count_nonzero(sizes)
        if any(len(np.unique(batch)) < tasks for batch in self.order.reshape(-1, batch_size)):
            raise ValueError(
                f"A batch of {batch_size} images does not hold every one of {tasks} tasks with {sampling} sampling of "
                f"{self.sizes} images; raise per_device_train_batch_size"
                + ("." if sampling == "uniform" else " or choose sampling='uniform'.")
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        images = [self._images(task) for task in range(len(self.sizes))]
        return (next(images[task]) for task in self.order)

    def _images(self, task: int) -> Iterator[int]:
        """The images of one task in random order, again and again."""
        rng, start = np.random.default_rng([self.seed, self.epoch, task]), sum(self.sizes[:task])
        while True:
            yield from (start + rng.permutation(self.sizes[task])).tolist()

"""In which order the images of all tasks are seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


def interleave(shares: Sequence[float], rows: int) -> np.ndarray:
    """Spread tasks evenly over rows: after any number of rows, each task has had its share of them to within two rows.

    Args:
        shares (`Sequence[float]`): share of each task; they add up to 1.
        rows (`int`): how many rows.

    Returns:
        Array (rows,) of task numbers.
    """
    shares = np.asarray(shares, dtype=np.float64)
    seen, order = np.zeros(len(shares)), np.empty(rows, dtype=np.int64)
    for row in range(rows):
        order[row] = np.argmax(shares * (row + 1) - seen)
        seen[order[row]] += 1
    return order


class TaskSampler(Sampler[int]):
    """The order of one epoch's images, in which all tasks alternate.

    Batches are consecutive parts of this order. So every batch of every process holds every task, and a step sees the
    same images whether it runs as one large batch, as several accumulated ones, or on several processes. The order
    depends on seed and epoch only. An epoch consists of whole steps.

    Args:
        sizes (`Sequence[int]`): number of images of each task. The images of the first task have the lowest indices,
            then come those of the second, and so on. A task without images takes no part.
        batch_size (`int`): images of one batch on one process.
        batches_per_step (`int`): batches of one optimizer step, counted over all processes and accumulated batches.
        sampling (`str`): `"uniform"` gives every task the same share of a batch, so that images of small tasks come
            more often; `"proportional"` gives each a share in proportion to its number of images.
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
        step = batch_size * batches_per_step
        self.steps = max(sum(sizes) // step, 1)
        rows = self.steps * step
        tasks = np.flatnonzero(sizes)
        weights = np.minimum(sizes, 1) if sampling == "uniform" else np.array(sizes)
        shares = weights / weights.sum()
        self.order = interleave(shares, rows)
        for start in range(0, rows, batch_size):
            missing = set(tasks.tolist()) - set(self.order[start : start + batch_size].tolist())
            if missing:
                raise ValueError(
                    f"A batch of {batch_size} images does not hold every one of {len(tasks)} tasks with "
                    f"{sampling} sampling of {self.sizes} images; raise per_device_train_batch_size"
                    + ("." if sampling == "uniform" else " or choose sampling='uniform'.")
                )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        streams = [self._stream(task) for task in range(len(self.sizes))]
        for task in self.order:
            yield next(streams[task])

    def _stream(self, task: int) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch, task])
        start = sum(self.sizes[:task])
        while True:
            for number in rng.permutation(self.sizes[task]):
                yield start + int(number)

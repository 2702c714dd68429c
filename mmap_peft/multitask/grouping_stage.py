"""Stage 1: training one adapter that all tasks share, and comparing their gradients with respect to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .adapters import GLOBAL
from .affinity import cosine_similarity, task_gradients
from .checkpoint_files import saved_state
from .images import IGNORE_INDEX
from .processes import shard_rows
from .task_trainer import TaskTrainer


SNAPSHOTS_KEY = "snapshots"  # in `saved_state` of checkpoints of stage 1 only


class SharedAdapterTrainer(TaskTrainer):
    """Trains the adapter that all tasks share, and measures the similarity of the tasks' gradients (a snapshot) at
    evenly spaced steps, the last time at the end.

    The adapter only initializes those of the groups, so the classifier does not count it as trained.

    Args:
        args, kwargs: as for `TaskTrainer`.

    Attributes:
        similarities (`dict[int, np.ndarray]`): the result of `snapshot` by training step.
    """

    keeps_adapters = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.similarities: dict[int, np.ndarray] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        count = args.grouping_snapshots
        if state.global_step in {round((i + 1) * state.max_steps / count) for i in range(count)}:
            self.similarities[state.global_step] = self.snapshot()

    def snapshot(self) -> np.ndarray:
        """Cosines of the tasks' gradients with respect to all parameters of the shared adapter, (tasks, tasks)."""
        with self.compute_loss_context_manager():
            gradients = task_gradients(self.model, GLOBAL, self.snapshot_batches())
        gradients = self.accelerator.reduce(gradients, reduction="sum")
        return cosine_similarity(gradients, list(self.model.tasks))

    def snapshot_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share of the images of one snapshot. All processes have the same number of batches."""
        data, chosen = self.train_dataset, []
        for task, size in enumerate(data.sizes):
            rng = np.random.default_rng([self.args.seed, self.state.global_step, task])
            chosen.extend(data.starts[task] + rng.permutation(size)[: self.args.snapshot_images])
        shards = shard_rows(np.array(chosen), self._train_batch_size, self.args.process_index, self.args.world_size)
        for rows in shards:
            batch = self.data_collator([data[int(row)] for row in (rows if len(rows) else chosen[:1])])
            if not len(rows):  # fewer images than processes: an image that does not count
                batch["labels"].fill_(IGNORE_INDEX)
            yield batch

    def checkpoint_state(self) -> dict[str, Any]:
        snapshots = [matrix.tolist() for matrix in self.similarities.values()]
        return {**super().checkpoint_state(), "snapshot_steps": list(self.similarities), SNAPSHOTS_KEY: snapshots}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = saved_state(Path(resume_from_checkpoint))
        self.similarities = dict(zip(saved["snapshot_steps"], map(np.array, saved[SNAPSHOTS_KEY])))

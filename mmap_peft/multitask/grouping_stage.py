"""Stage 1: training one adapter that all tasks share, and comparing their gradients with respect to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils.logging import tqdm

from .adapters import GLOBAL
from .affinity import MOST_ELEMENTS, Snapshot, from_tensors, snapshot_steps, to_tensors
from .checkpoint_files import GRADIENTS_FILE
from .files import read_tensors
from .images import IGNORE_INDEX
from .processes import shard_rows
from .task_gradients import task_gradients
from .task_trainer import TaskTrainer


PARTS = 4  # disjoint parts of each task's images
TASKS_AT_ONCE = 16  # whose texts are in memory at the same time


class SharedAdapterTrainer(TaskTrainer):
    """Trains the adapter that all tasks share, and compares the tasks' gradients (a snapshot) after some steps.

    The adapter only initializes those of the groups, so the classifier does not count it as trained.

    Args:
        args, kwargs: as for `TaskTrainer`.

    Attributes:
        snapshots (`list[Snapshot]`): the results of `snapshot`.
    """

    keeps_adapters = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.snapshots: list[Snapshot] = []

    def snapshot_steps(self) -> list[int]:
        """The steps after which a snapshot is taken."""
        args = self.args
        return snapshot_steps(args.affinity, args.grouping_steps, args.grouping_snapshots)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.snapshot_steps():
            self.snapshots.append(self.snapshot())

    def snapshot(self) -> Snapshot:
        """The tasks' gradients with respect to all parameters of the shared adapter, and their inner products.

        Some tasks at a time, and of each part of the images by itself, so that memory grows by the gradients only: at
        most 7 MB a task.
        """
        tasks, chosen = list(self.model.tasks), self._chosen_images()
        size = sum(parameter.numel() for parameter in self.model.adapter_parameters(GLOBAL).values())
        elements = torch.from_numpy(np.random.default_rng(0).permutation(size)[:MOST_ELEMENTS].copy())
        gradients = torch.zeros(len(tasks), PARTS, len(elements), device=self.args.device)
        losses = torch.zeros(len(tasks), PARTS, dtype=torch.float64, device=self.args.device)
        work = list(itertools.product(range(0, len(tasks), TASKS_AT_ONCE), range(PARTS)))
        hidden = self.args.disable_tqdm or not self.is_local_process_zero()
        for start, part in tqdm(work, desc="Gradients", leave=False, disable=hidden):
            block = slice(start, start + TASKS_AT_ONCE)
            rows = np.concatenate([images[part::PARTS] for images in chosen[block]])
            if not len(rows):  # tasks with fewer images than parts
                continue
            with self.compute_loss_context_manager():
                found, loss = task_gradients(self.model, GLOBAL, self._batches(rows), tasks[block])
            gradients[block, part], losses[block, part] = found[:, elements].float(), loss.to(losses.device)
        counts = torch.tensor([len(images) for images in chosen], device=gradients.device).clamp(min=1)[:, None]
        gradients = self.accelerator.reduce(gradients, reduction="sum") / counts[..., None]
        losses = self.accelerator.reduce(losses, reduction="sum") / counts
        return Snapshot.of(self.state.global_step, gradients, losses, tasks)

    def _chosen_images(self) -> list[np.ndarray]:
        """For each task the images of a snapshot, in random order."""
        data, args, chosen = self.train_dataset, self.args, []
        for task, size in enumerate(data.sizes):
            rng = np.random.default_rng([args.seed, self.state.global_step, task])
            chosen.append(data.starts[task] + rng.permutation(size)[: args.snapshot_images])
        return chosen

    def _batches(self, rows: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share of some images. All processes have the same number of batches."""
        for shard in shard_rows(rows, self._train_batch_size, self.args.process_index, self.args.world_size):
            batch = self.image_batch(shard if len(shard) else rows[:1])
            if not len(shard):  # fewer images than processes: an image that does not count
                batch["labels"].fill_(IGNORE_INDEX)
            yield batch

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            save_file(to_tensors(self.snapshots), Path(output_dir or self.args.output_dir) / GRADIENTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = from_tensors(read_tensors(Path(resume_from_checkpoint) / GRADIENTS_FILE))
        self.snapshots = [each for each in saved if each.step in self.snapshot_steps()]

"""The trainer of a run."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import AutoModel, TrainerCallback

from mmap_peft.data.pictograms import small_clip
from mmap_peft.methods.linear_probe import LinearProbeConfig
from mmap_peft.multitask.arguments import MultiTaskTrainingArguments
from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.multitask.loading import load_processor
from mmap_peft.multitask.task import Task
from mmap_peft.multitask.task_trainer import TaskTrainer
from mmap_peft.multitask.trainer import MultiTaskTrainer

from .study import SMALL_CLIP, Run


def make_trainer(
    run: Run, tasks: list[Task], args: MultiTaskTrainingArguments, callbacks: Sequence[TrainerCallback] = ()
) -> TaskTrainer:
    """A trainer of a new classifier of these tasks, with the model and method of a run."""
    name = str(small_clip()) if run.model == SMALL_CLIP else run.model
    # A trainer needs a model with adapters. For zero-shot, a linear probe does not change the CLIP.
    config = run.experiment.peft_config() or LinearProbeConfig()
    base = AutoModel.from_pretrained(name)
    classifier = MultiTaskClassifier(base, load_processor(name), tasks, config, seed=run.seed)
    # A single task needs no groups.
    kind = TaskTrainer if run.experiment.tasks == "alone" else MultiTaskTrainer
    return kind(model=classifier, args=args, callbacks=list(callbacks))

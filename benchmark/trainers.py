"""The trainer of a run, and its training."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import AutoModel, TrainerCallback, set_seed

from mmap_peft.data.pictograms import small_clip
from mmap_peft.methods.linear_probe import LinearProbeConfig
from mmap_peft.multitask.arguments import MultiTaskTrainingArguments
from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.multitask.loading import load_processor
from mmap_peft.multitask.lora_merging import merge_lora
from mmap_peft.multitask.task import Task
from mmap_peft.multitask.task_trainer import TaskTrainer
from mmap_peft.multitask.trainer import MultiTaskTrainer
from mmap_peft.multitask.wise_ft import wise_ft

from .run import SMALL_CLIP, Run


def make_trainer(
    run: Run, tasks: list[Task], args: MultiTaskTrainingArguments, callbacks: Sequence[TrainerCallback] = ()
) -> TaskTrainer:
    """A trainer of a new classifier of these tasks, with the model and method of a run."""
    name = str(small_clip()) if run.model == SMALL_CLIP else run.model
    # A trainer needs a model with adapters. For zero-shot, a linear probe does not change the CLIP.
    config = run.experiment.peft_config() or LinearProbeConfig()
    base = AutoModel.from_pretrained(name)
    classifier = MultiTaskClassifier(base, load_processor(name), tasks, config, seed=run.seed)
    if run.experiment.tasks != "together" and getattr(config, "probe", False):
        classifier.separate_adapters(run.seed)  # a probe belongs to an adapter of a task's own
    if run.experiment.steps_per_shot and "max_steps" not in run.experiment.training:
        args = copy.copy(args)
        args.max_steps = run.experiment.steps_per_shot * images_per_class(tasks)
    # A single task needs no groups.
    kind = MultiTaskTrainer if run.experiment.tasks == "together" else TaskTrainer
    return kind(model=classifier, args=args, callbacks=list(callbacks))


def images_per_class(tasks: Sequence[Task]) -> int:
    """Training images of a class that trains, the mean over these of all tasks, rounded up."""
    images = sum(len(task.labels("train")) for task in tasks)
    return math.ceil(images / sum(len(task.trained_classes) for task in tasks))


@dataclass
class Trained:
    """A trained classifier.

    Attributes:
        trainer (`TaskTrainer`): its trainer.
        parameters (`int`): number of parameters that were trained.
        seconds (`float`): how long training and what followed it took, without loading models.
    """

    trainer: TaskTrainer
    parameters: int = 0
    seconds: float = 0.0

    def train(self, run: Run) -> MultiTaskClassifier:
        """Train as the experiment of a run says."""
        start = time.perf_counter()
        if run.experiment.method != "zero_shot":
            self.trainer.train()
            self.parameters = sum(each.numel() for each in self.trainer.model.parameters() if each.requires_grad)
        if run.experiment.merging and run.experiment.tasks != "merged":
            wise_ft(self.trainer.model, **run.experiment.merging)
        self.seconds = time.perf_counter() - start
        return self.trainer.model


def train(
    run: Run, tasks: list[Task], args: MultiTaskTrainingArguments, callbacks: Sequence[TrainerCallback] = ()
) -> Trained:
    """Train a new classifier of these tasks, or with `tasks="merged"` one of each, which are merged."""
    if run.experiment.tasks != "merged":
        trained = Trained(make_trainer(run, tasks, args, callbacks))
        trained.train(run)
        return trained
    parameters, seconds = 0, 0.0

    def each_alone() -> Iterator[MultiTaskClassifier]:  # one of them is in memory at a time
        nonlocal parameters, seconds
        for task in tasks:
            set_seed(run.seed)
            trained = Trained(make_trainer(run, [task], args, callbacks))
            yield trained.train(run)
            parameters, seconds = parameters + trained.parameters, seconds + trained.seconds

    classifier = merge_lora(each_alone(), **run.experiment.merging)
    return Trained(TaskTrainer(model=classifier, args=args), parameters, seconds)

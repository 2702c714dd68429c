"""Train and evaluate one run, in a process of its own: `python -m benchmark.measure RESULT < run.json`."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.benchmark import timer
from transformers import AutoModel, TrainerCallback, set_seed

from mmap_peft.data.pictograms import small_clip
from mmap_peft.methods.linear_probe import LinearProbeConfig
from mmap_peft.multitask.arguments import MultiTaskTrainingArguments
from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.multitask.files import write_json
from mmap_peft.multitask.loading import WEIGHTS_FILE, load_processor
from mmap_peft.multitask.task import Task
from mmap_peft.multitask.task_trainer import TaskTrainer
from mmap_peft.multitask.trainer import MultiTaskTrainer

from .data import hold_out
from .machine import origin, peak_memory, reset_peak_memory, total_peak_memory
from .study import SMALL_CLIP, Run


WARM_UP = 3  # the first steps of a training are slower; their times are left out, if there are more steps


class StepMeter(TrainerCallback):
    """Measures a trainer that may train in several stages.

    Attributes:
        count (`int`): steps of all stages.
        waiting (`float`): seconds of all stages in which the next images were not ready.
        seconds (`list[float]`): time of each step (forward, backward, update) of the last stage.
        peak (`int`): peak memory in bytes while the last stage trained; 0 if nothing was trained.
    """

    def __init__(self) -> None:
        self.count = 0
        self.waiting = 0.0
        self.seconds: list[float] = []
        self.peak = 0
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = []
        reset_peak_memory()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = timer()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(timer() - self._start)
        self.count += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.waiting += logs.get("train_waiting_share", 0.0) * logs.get("train_runtime", 0.0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.peak = peak_memory()


@dataclass
class ClassifierResult:
    """The result of one classifier. A run has one classifier for all tasks, or one for each task.

    Args:
        accuracy (`dict[str, float]`): by task, 0 to 1.
        groups (`list[list[str]]`, *optional*): groups of the tasks, if they were grouped.
        trainable_parameters, base_size, adapter_bytes (`int`): number of trained parameters, number of parameters of
            the CLIP, and size of the saved weights.
        meter (`StepMeter`): measurements of its training.
        train_seconds, evaluate_seconds (`float`): how long training and evaluation took.
    """

    accuracy: dict[str, float]
    groups: list[list[str]] | None
    trainable_parameters: int
    base_size: int
    adapter_bytes: int
    meter: StepMeter
    train_seconds: float
    evaluate_seconds: float


def measure(run: Run) -> dict[str, Any]:
    """Train, and evaluate once at the end.

    Returns:
        A result of plain numbers, texts, lists and dicts; docs/benchmark.md lists its fields.
    """
    start, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        args = run.experiment.arguments(output_dir=folder, seed=run.seed)
        domains, split = run.data.read(run.fraction, run.shots, run.seed)
        if run.validation:
            tasks, split = hold_out(domains, split, args.template, run.seed)
        else:
            tasks = run.data.tasks(split, domains, args.template)
        for part in [[task] for task in tasks] if run.experiment.tasks == "alone" else [tasks]:
            results.append(_measure_classifier(run, part, args))
            gc.collect()  # frees this classifier's CLIP before the next one is loaded
    return {
        **_summarise(results, time.perf_counter() - start),
        "split": split.digest,
        "settings": run.settings,
        "seed": run.seed,
        **origin(),
    }


def _measure_classifier(run: Run, tasks: list[Task], args: MultiTaskTrainingArguments) -> ClassifierResult:
    set_seed(run.seed)
    meter = StepMeter()
    trainer = _trainer(run, tasks, args, meter)
    classifier = trainer.model
    parameters = adapter_bytes = 0
    start = time.perf_counter()
    if run.experiment.method != "zero_shot":
        trainer.train()
        parameters = sum(parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad)
        adapter_bytes = _adapter_bytes(classifier, Path(args.output_dir) / "adapters" / tasks[0].adapter)
    trained = time.perf_counter()
    return ClassifierResult(
        accuracy=_accuracies(trainer, run),
        groups=None if classifier.grouping is None else classifier.grouping.groups,
        trainable_parameters=parameters,
        base_size=classifier.base_size,
        adapter_bytes=adapter_bytes,
        meter=meter,
        train_seconds=trained - start,
        evaluate_seconds=time.perf_counter() - trained,
    )


def _summarise(results: list[ClassifierResult], total_seconds: float) -> dict[str, Any]:
    """The numbers of a run from those of its classifiers."""
    accuracy = {task: value for result in results for task, value in result.accuracy.items()}
    parameters = sum(result.trainable_parameters for result in results)
    step_seconds = []
    for result in results:
        seconds = result.meter.seconds
        step_seconds += seconds[WARM_UP:] or seconds
    return {
        "accuracy": accuracy,
        "mean": statistics.fmean(accuracy.values()),
        "worst": min(accuracy.values()),
        "groups": results[-1].groups,
        "trainable_parameters": parameters,
        "share_of_base": parameters / results[-1].base_size,
        "adapter_bytes": sum(result.adapter_bytes for result in results),
        "steps": sum(result.meter.count for result in results),
        "seconds": {
            "step": statistics.median(step_seconds) if step_seconds else None,
            "train": sum(result.train_seconds for result in results),
            "waiting": sum(result.meter.waiting for result in results),
            "evaluate": sum(result.evaluate_seconds for result in results),
            "total": total_seconds,
        },
        "peak_bytes": {"step": max(result.meter.peak for result in results) or None, "total": total_peak_memory()},
    }


def _trainer(run: Run, tasks: list[Task], args: MultiTaskTrainingArguments, meter: StepMeter) -> TaskTrainer:
    name = str(small_clip()) if run.model == SMALL_CLIP else run.model
    # A trainer needs a model with adapters. For zero-shot, a linear probe does not change the CLIP.
    config = run.experiment.peft_config() or LinearProbeConfig()
    base = AutoModel.from_pretrained(name)
    classifier = MultiTaskClassifier(base, load_processor(name), tasks, config, seed=run.seed)
    # A single task needs no groups.
    kind = TaskTrainer if run.experiment.tasks == "alone" else MultiTaskTrainer
    return kind(model=classifier, args=args, callbacks=[meter])


def _accuracies(trainer: TaskTrainer, run: Run) -> dict[str, float]:
    classifier = trainer.model
    if run.experiment.method == "zero_shot":
        with classifier.zero_shot():
            metrics = trainer.evaluate()
    else:
        metrics = trainer.evaluate()
    return {task.adapter: metrics[f"eval_{task.adapter}_accuracy"] for task in classifier.tasks.values()}


def _adapter_bytes(classifier: MultiTaskClassifier, folder: Path) -> int:
    classifier.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob(f"*/{WEIGHTS_FILE}"))


if __name__ == "__main__":
    write_json(measure(Run.from_dict(json.load(sys.stdin))), sys.argv[1])

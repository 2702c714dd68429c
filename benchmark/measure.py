"""Train and evaluate one run, in a process of its own: `python -m benchmark.measure RESULT < run.json`."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from torch.utils.benchmark import timer
from transformers import TrainerCallback, set_seed

from mmap_peft.data.duplicates import find_duplicates
from mmap_peft.data.splits import Split
from mmap_peft.multitask.arguments import MultiTaskTrainingArguments
from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.multitask.files import write_json
from mmap_peft.multitask.loading import WEIGHTS_FILE
from mmap_peft.multitask.task_trainer import TaskTrainer

from . import means
from .machine import origin, peak_memory, reset_peak_memory, total_peak_memory
from .planted_runs import PLANTED_RUNS
from .predictions import accuracy_by_task, correct, predict
from .protocols import AT_ONCE, Training, evaluated, read_targets, trainings, without_duplicates
from .run import Run
from .trainers import train


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
        correct (`dict[str, str]`): by task, a bit for each test image, 1 if its class was predicted; hexadecimal.
        predictions (`pa.Table`): as `predict` returns them.
        groups (`list[list[str]]`, *optional*): groups of the tasks, if they were grouped.
        trainable_parameters, base_size, adapter_bytes (`int`): number of trained parameters, number of parameters of
            the CLIP, and size of the saved weights.
        meter (`StepMeter`): measurements of its training.
        train_seconds, evaluate_seconds (`float`): how long training and evaluation took.
        routing (`dict[str, float]`, *optional*): of test images whose task is not given, the share whose task was
            found (`tasks`) and whose class was right (`answers`), and the latter if the task is given (`given`).
    """

    accuracy: dict[str, float]
    correct: dict[str, str]
    predictions: pa.Table
    groups: list[list[str]] | None
    trainable_parameters: int
    base_size: int
    adapter_bytes: int
    meter: StepMeter
    train_seconds: float
    evaluate_seconds: float
    routing: dict[str, float] | None = None


def measure(run: Run, predictions: str | os.PathLike | None = None) -> dict[str, Any]:
    """Train, and evaluate once at the end.

    Args:
        run (`Run`): the run.
        predictions (*optional*): a path: predictions of the test images are written there, as a parquet file.

    Returns:
        A result of plain numbers, texts, lists and dicts; docs/benchmark.md lists its fields.
    """
    start, results = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        args = _arguments(run, folder)
        domains, split = run.data.read(run.fraction, run.shots, run.seed)
        targets = read_targets(run)
        split = without_duplicates(run, domains, split, targets)
        if run.evaluated_on == "validation":
            tasks, split = run.data.hold_out(split, domains, args.template, run.seed)
        else:
            tasks = run.data.make_tasks(split, domains, args.template)
        if run.evaluated_on in PLANTED_RUNS:
            found = PLANTED_RUNS[run.evaluated_on](run, tasks, args)
            found["seconds"] = {"total": time.perf_counter() - start}
            found["peak_bytes"] = {"total": total_peak_memory()}
        else:
            for part in trainings(run, tasks, targets):
                results.append(_measure_classifier(run, part, args))
                gc.collect()  # frees this classifier's CLIP before the next one is loaded
            found = _summarise(run, results, time.perf_counter() - start)
            if run.evaluated_on == "test":
                found |= _test_images(*evaluated(domains, split, targets))
                if predictions is not None:
                    pq.write_table(pa.concat_tables(each.predictions for each in results), predictions)
    return {**found, "split": split.digest, "settings": run.settings, "seed": run.seed, **origin()}


def _test_images(domains: dict[str, Dataset], split: Split) -> dict[str, Any]:
    """Which images they are, and how many training images are near-duplicates of them."""
    found = sum(map(len, find_duplicates(domains, split).values()))
    duplicates = {"found": found, "dropped": split.source.get("duplicates", 0)}
    return {"test_images": Split({}, split.eval, {}).digest, "duplicates": duplicates}


def _arguments(run: Run, folder: str) -> MultiTaskTrainingArguments:
    given = {}
    if run.experiment.groups:
        groups = run.data.groups(run.experiment.groups, run.seed)
        given = {"grouping": "given", "given_groups": ",".join("+".join(each) for each in groups)}
    return run.experiment.arguments(output_dir=folder, seed=run.seed, **given)


def _measure_classifier(run: Run, training: Training, args: MultiTaskTrainingArguments) -> ClassifierResult:
    set_seed(run.seed)
    meter, tasks = StepMeter(), training.tasks
    trained = train(run, tasks, args, [meter])
    classifier, adapter_bytes = trained.trainer.model, 0
    if run.experiment.method != "zero_shot":
        adapter_bytes = _adapter_bytes(classifier, Path(args.output_dir) / "adapters" / tasks[0].adapter)
    start = time.perf_counter()
    return ClassifierResult(
        **_evaluate(trained.trainer, run, training),
        groups=None if classifier.grouping is None else classifier.grouping.groups,
        trainable_parameters=trained.parameters,
        base_size=classifier.base_size,
        adapter_bytes=adapter_bytes,
        meter=meter,
        train_seconds=trained.seconds,
        evaluate_seconds=time.perf_counter() - start,
        routing=_routing(classifier) if run.experiment.routing else None,
    )


def _summarise(run: Run, results: list[ClassifierResult], total_seconds: float) -> dict[str, Any]:
    """The numbers of a run from those of its classifiers."""
    accuracy = {task: value for result in results for task, value in result.accuracy.items()}
    parameters = sum(result.trainable_parameters for result in results)
    step_seconds = []
    for result in results:
        seconds = result.meter.seconds
        step_seconds += seconds[WARM_UP:] or seconds
    return {
        "accuracy": accuracy,
        "correct": {task: bits for result in results for task, bits in result.correct.items()},
        **means.protocol_mean(run.protocol, accuracy),
        "worst": min(means.trained(run.protocol, accuracy).values()),
        "groups": results[-1].groups,
        "trainable_parameters": parameters,
        "share_of_base": parameters / results[-1].base_size,
        "adapter_bytes": sum(result.adapter_bytes for result in results),
        **({"routing": results[-1].routing} if results[-1].routing else {}),
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


def _evaluate(trainer: TaskTrainer, run: Run, training: Training) -> dict[str, Any]:
    """The accuracy of each task, which of its test images were right, and all predictions."""
    classifier = trainer.model
    with classifier.zero_shot() if run.experiment.method == "zero_shot" else nullcontext():
        if training.evaluate is not None:
            table = pa.concat_tables(training.evaluate(classifier).values())
            return {"accuracy": accuracy_by_task(table), "correct": correct(table), "predictions": table}
        metrics, table = predict(trainer)
    tasks = [task.adapter for task in classifier.tasks.values()]
    accuracy = {task: metrics[f"eval_{task}_accuracy"] for task in tasks}
    return {"accuracy": accuracy, "correct": correct(table), "predictions": table}


def _routing(classifier: MultiTaskClassifier) -> dict[str, float]:
    classifier.compute_prototypes()
    found = []
    for name, task in classifier.tasks.items():
        true = [task.class_names[number] for number in task.labels("eval")]
        for start in range(0, len(true), AT_ONCE):
            images = task.eval[start : start + AT_ONCE]["image"]
            routed, given = classifier.predict(images), classifier.predict(images, task=name)
            answers = zip(routed.tasks, routed.labels, given.labels, true[start:])
            found += [(one == name, label == right, same == right) for one, label, same, right in answers]
    return dict(zip(("tasks", "answers", "given"), np.mean(found, axis=0).tolist()))


def _adapter_bytes(classifier: MultiTaskClassifier, folder: Path) -> int:
    classifier.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob(f"*/{WEIGHTS_FILE}"))


if __name__ == "__main__":
    write_json(measure(Run.from_dict(json.load(sys.stdin)), Path(sys.argv[1]).with_suffix(".parquet")), sys.argv[1])

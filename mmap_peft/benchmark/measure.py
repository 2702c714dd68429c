"""One run, in a process of its own: `python -m mmap_peft.benchmark.measure RESULT < run.json`."""

from __future__ import annotations

import contextlib
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, TrainerCallback, set_seed

from ..data.pictograms import small_clip
from ..methods.linear_probe import LinearProbeConfig
from ..multitask.classifier import MultiTaskClassifier
from ..multitask.files import write_json
from ..multitask.record import versions
from ..multitask.saving import WEIGHTS_FILE, load_processor
from ..multitask.task import Task
from ..multitask.task_trainer import TaskTrainer
from ..multitask.trainer import MultiTaskTrainer
from .data import hold_out
from .study import SMALL_CLIP, Run


WARM_UP = 3  # steps, of which each run leaves the times out if it has more
_PACKAGE = Path(__file__).parents[1]


class Steps(TrainerCallback):
    """Takes the time of each step (forward, backward, update) and the peak memory of the last stage of training, and
    counts the steps, and the seconds that no images were there, of all stages."""

    def __init__(self) -> None:
        self.count = 0
        self.waiting = 0.0
        self.seconds: list[float] = []
        self.peak = 0
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = []
        forget_peak()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronise()
        self.seconds.append(time.perf_counter() - self._start)
        self.count += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.waiting += logs.get("train_waiting_share", 0.0) * logs.get("train_runtime", 0.0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.peak = peak_memory()


def measure(run: Run) -> dict[str, Any]:
    """Train, evaluate once at the end, and tell all about it.

    Returns:
        As JSON knows it: `accuracy` by task, `mean` and `worst` (0 to 1), `groups`, `trainable_parameters`,
        `share_of_base`, `adapter_bytes`, `seconds` (`step`: median of a training step; `train`; `waiting`, of `train`,
        for images; `evaluate`; `total`), `peak_bytes` (`step`: while training; `total`), `steps`, `split`, `settings`,
        `seed`, `machine`, `code`.
    """
    start = time.perf_counter()
    found = {"accuracy": {}, "groups": None, "trainable_parameters": 0, "adapter_bytes": 0, "steps": 0}
    times, step_times, peaks = {"train": 0.0, "waiting": 0.0, "evaluate": 0.0}, [], [0]
    with tempfile.TemporaryDirectory() as folder:
        args = run.experiment.arguments(output_dir=folder, seed=run.seed)
        domains, split = run.data.read(run.fraction, run.shots, run.seed)
        if run.validation:
            tasks, split = hold_out(domains, split, args.template, run.seed)
        else:
            tasks = run.data.tasks(split, domains, args.template)
        for part in [[task] for task in tasks] if run.experiment.tasks == "alone" else [tasks]:
            set_seed(run.seed)
            steps = Steps()
            trainer = _trainer(run, part, args, steps)
            classifier = trainer.model
            began = time.perf_counter()
            if run.experiment.method != "zero_shot":
                trainer.train()
                found["trainable_parameters"] += sum(
                    parameter.numel() for parameter in classifier.parameters() if parameter.requires_grad
                )
                found["adapter_bytes"] += _adapter_bytes(classifier, Path(folder) / "adapters" / part[0].adapter)
            trained = time.perf_counter()
            found["accuracy"].update(_accuracies(trainer, run))
            times["train"] += trained - began
            times["waiting"] += steps.waiting
            times["evaluate"] += time.perf_counter() - trained
            step_times += steps.seconds[WARM_UP if len(steps.seconds) > WARM_UP else 0 :]
            peaks.append(steps.peak)
            found["steps"] += steps.count
            found["share_of_base"] = found["trainable_parameters"] / classifier.base_size
            if classifier.grouping is not None:
                found["groups"] = classifier.grouping.groups
            del trainer, classifier  # and with them a base, before the next one is loaded
            gc.collect()
    accuracies = list(found["accuracy"].values())
    return {
        **found,
        "mean": statistics.fmean(accuracies),
        "worst": min(accuracies),
        "seconds": {
            "step": statistics.median(step_times) if step_times else None,
            **times,
            "total": time.perf_counter() - start,
        },
        "peak_bytes": {"step": max(peaks) or None, "total": max(*peaks, _peaks_before, peak_memory())},
        "split": split.digest,
        "settings": run.settings,
        "seed": run.seed,
        "machine": machine(),
        "code": {"versions": versions(), **commit()},
    }


def _trainer(run: Run, tasks: list[Task], args: Any, steps: Steps) -> TaskTrainer:
    name = str(small_clip()) if run.model == SMALL_CLIP else run.model
    # A trainer needs something that it could train; a probe is what leaves CLIP itself untouched.
    config = run.experiment.peft_config() or LinearProbeConfig()
    base = AutoModel.from_pretrained(name)
    classifier = MultiTaskClassifier(base, load_processor(name), tasks, config, seed=run.seed)
    # A task alone has one adapter and nobody to share a group with.
    kind = TaskTrainer if run.experiment.tasks == "alone" else MultiTaskTrainer
    return kind(model=classifier, args=args, callbacks=[steps])


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


# ---- memory

_peaks_before = 0  # what `forget_peak` made the system forget


def peak_memory() -> int:
    """Bytes: the most that torch had on the GPU, or without one the most that this process had in memory, since the
    start or the last `forget_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        # Not getrusage: what it says begins with the size of the process that started this one.
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        import resource  # which Windows lacks

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def forget_peak() -> None:
    """Let `peak_memory` begin anew, where the system can."""
    global _peaks_before
    _peaks_before = max(_peaks_before, peak_memory())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def synchronise() -> None:
    """Wait until a GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- where and with what


def machine() -> dict[str, Any]:
    """Device, system and threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"device": device, "system": platform.system(), "threads": torch.get_num_threads()}


def commit() -> dict[str, Any]:
    """The package's commit, and whether its files differ from it; `None` outside of a repository of its own."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not the repository around a virtual environment
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}


if __name__ == "__main__":
    write_json(measure(Run.from_dict(json.load(sys.stdin))), sys.argv[1])

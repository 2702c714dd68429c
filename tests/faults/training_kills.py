"""Training is killed, the disk is full, a checkpoint is damaged: resuming gives the uninterrupted run, to the bit."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, MultiTaskTrainingArguments, load_processor
from mmap_peft.data.pictograms import small_clip
from tests.conftest import make_task, tiny_clip

from .campaigns import Campaign, one_sentence


EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
shared = SimpleNamespace()


def make(output: Path) -> MultiTaskTrainer:
    args = MultiTaskTrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        max_steps=5,
        grouping_steps=3,
        grouping_snapshots=2,
        snapshot_images=4,
        save_steps=1,
        save_total_limit=2,
        logging_steps=1,
        image_cache_gb=0,
    )
    config = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)
    return MultiTaskTrainer(MultiTaskClassifier(tiny_clip(), load_processor(small_clip()), shared.tasks, config), args)


def state(classifier: MultiTaskClassifier) -> list:
    adapters = {name: classifier.adapter_parameters(name) for name in classifier.adapters}
    tensors = {name: {key: each.tolist() for key, each in adapter.items()} for name, adapter in adapters.items()}
    return [tensors, dict(classifier.routes)]


def in_child(call: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> int | None:
    """Run a call in a process of its own. Returns its exit status, `None` if it was killed."""
    process = os.fork()
    if not process:
        try:
            prepare()
            call()
        except KeyboardInterrupt:
            os._exit(0)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def prepare() -> None:
    shared.tasks = [make_task("print", 3), make_task("photo", 4)]
    folder = Path("/tmp/unused")
    trainer = make(folder / "whole")
    trainer.args.save_strategy = "no"
    trainer.train()
    shared.expected = state(trainer.model)
    shutil.rmtree(folder, ignore_errors=True)


def watch(output: Path, act: Callable[[int], None]) -> None:
    """Call a function with the number of each event that concerns a folder."""
    count = 0

    def event(name: str, details: tuple) -> None:
        nonlocal count
        if name in EVENTS and str(output) in str(details[:2]):
            count += 1
            act(count)

    sys.addaudithook(event)


def interrupt(way: str, number: int, delay: float, output: Path) -> None:
    """Let this process die, or its disk be full, at an event or after some seconds."""

    def act(count: int) -> None:
        if way == "full" and count > number:
            raise OSError(errno.ENOSPC, "No space left on device")
        if count == number and way == "interrupt":
            raise KeyboardInterrupt
        if count == number and way in ("kill", "terminate"):
            os.kill(os.getpid(), signal.SIGKILL if way == "kill" else signal.SIGTERM)

    if way == "timer":
        signal.setitimer(signal.ITIMER_REAL, delay)  # SIGALRM ends the process
    elif way == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 * number, 300 * number))
    else:
        watch(output, act)


def damage(rng: random.Random, output: Path) -> Path | None:
    """Damage a file of the last checkpoint. Returns the checkpoint."""
    folder = output if list(output.glob("checkpoint-?")) else output / "grouping"
    checkpoints = sorted(folder.glob("checkpoint-?"))
    if not checkpoints:
        return None
    files = sorted(path for path in checkpoints[-1].rglob("*") if path.is_file())
    path = rng.choice([each for each in files if each.name not in ("README.md", "training_args.json")])
    way, content = rng.choice(["cut", "empty", "remove", "flip", "older"]), path.read_bytes()
    if way == "remove" or not content:
        path.unlink()
    elif way == "older":
        older = checkpoints[0] / path.relative_to(checkpoints[-1])
        path.write_bytes(older.read_bytes() if older.exists() and len(checkpoints) > 1 else b"")
    elif way == "flip":
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
    else:
        path.write_bytes(content[: rng.randrange(len(content)) if way == "cut" else 0])
    return checkpoints[-1] if path.exists() is False or path.read_bytes() != content else None


def trial(rng: random.Random, folder: Path) -> None:
    output = folder / "out"
    trainer = make(output)
    for _ in range(rng.choice([1, 1, 2])):
        way = rng.choice(["kill"] * 4 + ["timer", "interrupt", "terminate", "full", "limit"])
        number, delay = rng.randrange(1, 700), rng.uniform(0.2, 3)
        resume = bool(list(output.rglob("checkpoint-?/checkpoint.json")))
        status = in_child(
            lambda resume=resume: one_sentence(lambda: trainer.train(resume_from_checkpoint=resume), "out"),
            lambda way=way, number=number, delay=delay: interrupt(way, number, delay, output),
        )
        assert status != 1 or way not in ("full", "limit"), f"no sentence about a disk that is full ({way}, {number})"
    damaged = damage(rng, output) if rng.random() < 0.3 else None
    if damaged is not None:
        before = state(trainer.model)
        answer = one_sentence(lambda: trainer.train(resume_from_checkpoint=str(damaged)), damaged.name)
        if answer is None:
            assert state(trainer.model) == before, "a checkpoint was refused, but something has changed"
        else:
            assert state(trainer.model) == shared.expected, "a damaged checkpoint was used"
            return
    if one_sentence(lambda: trainer.train(resume_from_checkpoint=True), "out") is None:
        left = [path for path in output.rglob("checkpoint-?") if path.parent.suffix != ".partial"]
        assert damaged or not left, f"{left} cannot be resumed from"
        trainer.train()
    assert state(trainer.model) == shared.expected, "training did not go on as it was"
    assert not list(output.rglob("*.partial")) + list(output.rglob(".saving*")), "leftovers"


CAMPAIGN = Campaign(trial, trials=110, few=2, prepare=prepare, seconds=120)

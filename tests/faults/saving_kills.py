"""A process is killed or the disk is full while a folder is saved over: it holds the old adapters or the new."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from mmap_peft import MmAPConfig, MultiTaskClassifier, TaskGrouping, load_processor, lora_config
from mmap_peft.data.pictograms import draw, small_clip
from tests.conftest import make_task, tiny_clip

from .campaigns import Campaign, one_sentence


IMAGES = [draw("print", "sun", number) for number in range(2)]
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir")
shared = SimpleNamespace()


def make(config: object, seed: int) -> MultiTaskClassifier:
    classifier = MultiTaskClassifier(tiny_clip(), load_processor(small_clip()), shared.tasks, config)
    if classifier.uses_prompts:
        names = list(classifier.tasks)
        snapshots = torch.eye(2, dtype=torch.float64).expand(2, 2, 2).numpy()
        groups = [names] if seed % 2 else [[name] for name in names]
        classifier.set_grouping(TaskGrouping(names, groups, snapshots.mean(0), snapshots))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in classifier.adapters:
            for parameter in classifier.adapter_parameters(adapter).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return classifier.eval()


def prepare() -> None:
    shared.tasks = [make_task("print", 3), make_task("photo", 4)]
    configs = [MmAPConfig(num_prompts=4, source_shape=(2, 4)), lora_config(r=2)]
    shared.classifiers = [[make(config, seed) for seed in range(3)] for config in configs]


def state(classifier: MultiTaskClassifier) -> list:
    probabilities = [classifier.predict(IMAGES, name).probabilities for name in classifier.tasks]
    return [classifier.adapters, dict(classifier.routes), torch.cat(probabilities, 1).tolist()]


def interrupted_save(rng: random.Random, classifier: MultiTaskClassifier, folder: Path) -> None:
    """Save in a process that dies at a random event or after a random time, or whose disk is full."""
    way = rng.choice(["kill", "kill", "kill", "timer", "interrupt", "terminate", "full", "limit"])
    number, delay, size = rng.randrange(60), rng.random() * 0.15, rng.randrange(20000)
    process = os.fork()
    if process:
        status = os.waitpid(process, 0)[1]
        assert not os.WIFEXITED(status) or not os.WEXITSTATUS(status), f"no sentence about a disk that is full ({way})"
        return
    count = 0

    def event(name: str, _: tuple) -> None:
        nonlocal count
        if name not in EVENTS:
            return
        count += 1
        if count == number + 1:
            if way == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif way == "interrupt":
                raise KeyboardInterrupt
            elif way == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
        if way == "full" and count > number:
            raise OSError(errno.ENOSPC, "No space left on device")

    if way == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    elif way == "timer":
        signal.setitimer(signal.ITIMER_REAL, delay)  # SIGALRM ends the process
    else:
        sys.addaudithook(event)
    try:
        one_sentence(lambda: classifier.save_pretrained(folder), "out")
    except BaseException as error:
        os._exit(0 if isinstance(error, KeyboardInterrupt) else 1)
    os._exit(0)


def race(rng: random.Random, classifiers: list[MultiTaskClassifier], folder: Path) -> None:
    """Two processes save again and again into one folder, from which a third one loads."""
    classifiers[0].save_pretrained(folder)
    states = [state(classifier) for classifier in classifiers]
    end, savers = time.monotonic() + 1.5, []
    for classifier in classifiers[1:]:
        savers.append(os.fork())
        if not savers[-1]:
            while time.monotonic() < end:
                classifier.save_pretrained(folder)
                time.sleep(rng.random() / 50)
            os._exit(0)
    while time.monotonic() < end:
        assert state(load(folder)) in states, "a mixture was loaded"
    for saver in savers:
        assert not os.waitpid(saver, 0)[1], "a process could not save beside another"


def load(folder: Path) -> MultiTaskClassifier:
    return MultiTaskClassifier.from_pretrained(folder, model=tiny_clip(), processor=load_processor(small_clip()))


def trial(rng: random.Random, folder: Path) -> None:
    classifiers = rng.choice(shared.classifiers)
    out, allowed = folder / "out", []
    if rng.random() < 0.1:
        race(rng, classifiers, out)
        return
    if rng.random() < 0.8:
        classifiers[0].save_pretrained(out)
        allowed = [state(classifiers[0])]
    for number in range(rng.choice([1, 1, 2])):
        new = classifiers[number + 1]
        interrupted_save(rng, new, out)
        allowed.append(state(new))
        loaded = one_sentence(lambda: load(out), "out")
        if loaded is None:
            assert len(allowed) == number + 1, "neither the old nor the new adapters can be loaded"
            continue
        found = state(loaded)
        assert found in allowed, "a mixture was loaded"
        allowed = [found]  # what a later save that is interrupted must leave
    last = rng.choice(classifiers)
    last.save_pretrained(out)
    assert state(load(out)) == state(last)
    assert not list(out.glob(".saving*")), "leftovers were not removed by the next save"


CAMPAIGN = Campaign(trial, trials=120, few=6, prepare=prepare)

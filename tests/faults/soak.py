"""A server under load: predictions of mixed tasks on many threads equal those of one, and memory stays flat."""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

from mmap_peft import MmAPConfig, MultiTaskClassifier, TaskGrouping, load_processor, lora_config
from mmap_peft.data.pictograms import draw, small_clip
from tests.conftest import make_task, tiny_clip

from .campaigns import Campaign


THREADS, GROWTH = 8, 30 * 2**20  # bytes
PREDICTIONS = 300 if "--few" in sys.argv else 20000  # of one trial
shared = SimpleNamespace()


def prepare() -> None:
    tasks = [make_task("print", 3), make_task("photo", 4), make_task("sketch", 5)]
    shared.images = [draw(style, "sun", number) for style in ("print", "photo", "sketch") for number in range(4)]
    shared.classifiers = []
    for config in (MmAPConfig(num_prompts=4, source_shape=(2, 4)), lora_config(r=2)):
        classifier = MultiTaskClassifier(tiny_clip(), load_processor(small_clip()), tasks, config)
        if classifier.uses_prompts:
            names, snapshots = list(classifier.tasks), torch.eye(3, dtype=torch.float64).expand(2, 3, 3).numpy()
            classifier.set_grouping(TaskGrouping(names, [names[:2], names[2:]], snapshots.mean(0), snapshots))
        with torch.no_grad():
            for adapter in classifier.adapters:
                for parameter in classifier.adapter_parameters(adapter).values():
                    parameter.copy_(torch.randn(parameter.shape) / 3)
        shared.classifiers.append(classifier.eval())


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def state() -> tuple[int, int, int]:
    """Bytes in memory, open files, and threads."""
    return resident(), len(os.listdir("/proc/self/fd")), threading.active_count()


def trial(rng: random.Random, folder: Path) -> None:
    images, requests = shared.images, []  # a classifier, images, and their task or tasks
    for classifier in 12 * shared.classifiers:
        rows = rng.choices(range(len(images)), k=rng.choice([1, 1, 2, 4]))
        tasks = rng.choices(list(classifier.tasks), k=len(rows))
        requests.append((classifier, [images[row] for row in rows], tasks if rng.random() < 0.7 else tasks[0]))
    expected = [classifier.predict(*request) for classifier, *request in requests]

    def predict(seed: int, count: int) -> None:
        own = random.Random(seed)
        for _ in range(count):
            number = own.randrange(len(requests))
            classifier, *request = requests[number]
            found = classifier.predict(*request)
            assert found.labels == expected[number].labels
            assert torch.allclose(found.probabilities, expected[number].probabilities, atol=1e-6)

    torch.set_num_threads(torch.get_num_threads())  # a forked process makes torch's pool anew, in one thread only

    with ThreadPoolExecutor(THREADS) as pool:

        def run(count: int) -> None:
            for done in [pool.submit(predict, rng.random(), count // THREADS) for _ in range(THREADS)]:
                done.result()

        run(max(PREDICTIONS // 5, 80))  # the first ones allocate what later ones use again
        before = state()
        run(PREDICTIONS)
        after = state()
    grown = after[0] - before[0]
    assert grown < GROWTH, f"memory grew by {grown / 2**20:.0f} MiB in {PREDICTIONS} predictions"
    assert after[1:] == before[1:], f"files and threads were {before[1:]} and are {after[1:]}"


CAMPAIGN = Campaign(trial, trials=1, few=1, prepare=prepare, seconds=1800, memory=4 * 2**30)

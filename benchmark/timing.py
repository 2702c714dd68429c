"""Time and memory of several ways to do the same, side by side."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .measure import forget_peak, peak_memory, synchronise


Runs = dict[str, Callable[[], Any]]


def measure_runs(runs: Runs, repeats: int, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Time and memory of some runs.

    Whatever else a machine does comes and goes, so each repetition runs all of them, one after the other, in turns
    forwards and backwards. Each has run twice before: once to warm up, once for its memory.

    Args:
        runs: by their names.
        repeats (`int`): how often the time of each is taken.
        tick: is called after each run, `(repeats + 2) * len(runs)` times.

    Returns:
        `seconds`, a list, `median` of it, and `peak_bytes` (see `peak_growth`), each by name.

    Raises:
        ValueError: no repetition.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} measures nothing; write 1 or more.")
    gc.collect()  # what was measured before these runs
    peaks: dict[str, int | None] = {}
    for name, run in runs.items():
        run()
        tick()
        peaks[name] = peak_growth(run)
        tick()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            synchronise()
            start = time.perf_counter()
            runs[name]()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
            tick()
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {"seconds": seconds, "median": medians, "peak_bytes": peaks}


def ratio(seconds: dict[str, list[float]], name: str, over: str) -> float:
    """The median over the repetitions of one run's time divided by another's in the same repetition."""
    return statistics.median(one / other for one, other in zip(seconds[name], seconds[over]))


def peak_growth(run: Callable[[], object]) -> int | None:
    """Bytes: the most memory that a run needs at once, beyond what is held before it: of the process, or on a GPU of
    what torch allocates there. `None` where the system cannot tell.

    What a first run sets up once and for all counts too; so run it once before.
    """
    if not torch.cuda.is_available() and not Path("/proc/self/clear_refs").exists():
        return None
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what was freed, and would not have to ask again
        ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    level = peak_memory()
    run()
    return max(0, peak_memory() - level)

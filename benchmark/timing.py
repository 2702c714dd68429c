"""Time and memory of several functions, measured side by side."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
from collections.abc import Callable
from typing import Any

from torch.utils.benchmark import timer

from .machine import can_reset_peak_memory, peak_memory, reset_peak_memory


Runs = dict[str, Callable[[], Any]]


def measure_runs(runs: Runs, repeats: int, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Measure the time and the memory of some functions.

    Each repetition calls all functions one after the other, in alternating order, so that other work on the machine
    slows down all of them alike. (`torch.utils.benchmark.Timer` measures one function after the other, and calls each
    twice more for every measurement.) Before, each function is called twice: to warm up, and to measure its memory.

    Args:
        runs: the functions, by name.
        repeats (`int`): how often the time of each is taken.
        tick: called after each call of a function, `(repeats + 2) * len(runs)` times.

    Returns:
        `seconds` (a list), `median` (of the list) and `peak_bytes` (see `peak_growth`), each a dict by name.

    Raises:
        ValueError: `repeats` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} measures nothing; write 1 or more.")
    gc.collect()  # frees what earlier measurements left
    peaks: dict[str, int | None] = {}
    for name, run in runs.items():
        run()
        tick()
        peaks[name] = peak_growth(run)
        tick()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: -1 if repeat % 2 else 1]:
            start = timer()
            runs[name]()
            seconds[name].append(timer() - start)
            tick()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"seconds": seconds, "median": medians, "peak_bytes": peaks}


def ratio(seconds: dict[str, list[float]], name: str, over: str) -> float:
    """The time of one function divided by that of another in the same repetition: the median over repetitions.

    Args:
        seconds: as `measure_runs` returns them.
        name, over: the functions' names.
    """
    return statistics.median(one / other for one, other in zip(seconds[name], seconds[over]))


def peak_growth(run: Callable[[], object]) -> int | None:
    """The peak memory during a call minus the memory before it, in bytes: of the whole process, or with a GPU of what
    torch allocates there. `None` where the system does not report it.

    Call `run` once before, so that memory of its first call is not counted.
    """
    if not can_reset_peak_memory():
        return None
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory, and would not ask for more
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak_memory()
    held = peak_memory()
    run()
    return max(0, peak_memory() - held)

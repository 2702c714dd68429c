"""Campaigns of seeded faults: many trials, each of which damages, misuses or kills something and says what is right.

A module of this folder with a `CAMPAIGN` is one campaign. `make faults` runs all of them at full length,
`python -m tests.faults folders --seeds 7 --trials 31` repeats one trial.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tests.faults


LONGEST_SENTENCE = 500  # characters of an error message


@dataclass(frozen=True)
class Campaign:
    """Trials of one kind of fault.

    Args:
        trial: called with random numbers and an empty folder; raises an exception if the library does wrong. It runs
            in a process of its own, which it may change, and in which it may be killed.
        trials: how many trials `make faults` runs for each seed.
        few: how many of them `make test` runs.
        prepare: called once before the first trial, for what trials share.
        seconds: a trial that takes longer has failed.
        memory: bytes of address space that a trial may take in addition to what its process starts with.
    """

    trial: Callable[[random.Random, Path], None]
    trials: int
    few: int
    prepare: Callable[[], Any] | None = None
    seconds: float = 60
    memory: int = 2 * 2**30


def campaigns() -> dict[str, Campaign]:
    """All campaigns by the names of their modules."""
    files = (each.name for each in pkgutil.iter_modules(tests.faults.__path__))
    names = [name for name in files if name != "__main__" and not name.startswith("test_")]
    modules = {name: importlib.import_module(f"tests.faults.{name}") for name in names}
    return {name: module.CAMPAIGN for name, module in modules.items() if hasattr(module, "CAMPAIGN")}


def one_sentence(call: Callable[[], Any], *names: str) -> Any:
    """The result of a call, or `None` if it raises what a user should see.

    That is a `ValueError` or an `OSError` of at most 500 characters on one line, which holds one of `names`, if any
    are given. Everything else raises an `AssertionError`.
    """
    try:
        return call()
    except (ValueError, OSError) as error:
        text = str(error)
        kind = f"{type(error).__name__} of {len(text)} characters: {text[:800]}"
        # An OSError of the system names its file; one that is a message of ours has no number.
        assert len(text) <= LONGEST_SENTENCE, f"too long: {kind}"
        assert "\n" not in text.strip(), f"more than one line: {kind}"
        assert " " in text, f"no sentence: {kind}"
        assert not names or any(name in text for name in names), f"names none of {names}: {kind}"
        assert type(error) in (ValueError, OSError) or isinstance(error, OSError), f"not a plain error: {kind}"
        return None


def run(name: str, campaign: Campaign, seed: int, number: int) -> str | None:
    """Run one trial in a process of its own. Returns what went wrong, or `None`."""
    folder = Path(tempfile.mkdtemp(prefix=f"fault_{name}_"))
    report = folder / "report"
    (folder / "work").mkdir()
    process = os.fork()
    if not process:
        _trial(campaign, random.Random(f"{name} {seed} {number}"), folder / "work", report)
    try:
        status = _wait(process, campaign.seconds)
        if status is None:
            return f"still running after {campaign.seconds} s"
        if os.WIFSIGNALED(status):
            return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
        return report.read_text() if report.exists() else None
    finally:
        _remove(folder)


def _trial(campaign: Campaign, rng: random.Random, folder: Path, report: Path) -> None:
    os.setpgid(0, 0)  # so that what the trial starts is killed with it
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + campaign.memory, resource.RLIM_INFINITY))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        campaign.trial(rng, folder)
    except BaseException:
        report.write_text(traceback.format_exc())
    os._exit(0)


def _wait(process: int, seconds: float) -> int | None:
    end, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < end:
        done, result = os.waitpid(process, os.WNOHANG)
        status = result if done else None
        time.sleep(0 if done else 0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if status is None:
        os.waitpid(process, 0)
    return status


def _remove(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)  # a trial may have taken permissions away
    shutil.rmtree(folder, ignore_errors=True)

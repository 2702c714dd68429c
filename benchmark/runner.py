"""Runs what has no result yet, each run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from mmap_peft.multitask.files import write_json
from mmap_peft.multitask.processes import cores

from .study import Run


MEASURE = (sys.executable, "-m", "benchmark.measure")
FIRST_PEAK = 2**30  # bytes that a run is expected to need before one has told


class Results:
    """A study's folder of results.

    Args:
        folder: where the results of this study are, and go.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def read(self, run: Run) -> dict[str, Any] | None:
        """The result of a run, or `None` if there is none.

        Raises:
            ValueError: the file is no result.
        """
        path = self.folder / run.path
        if not path.is_file():
            return None
        try:
            result = json.loads(path.read_text())
            result["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no result ({error!r}); remove it, and run the study again.") from error
        return result

    def sort(self, runs: Sequence[Run]) -> tuple[dict[Path, dict[str, Any]], list[Run], list[Run]]:
        """Results of their run's own settings by `Run.path`, runs whose result is of other settings, and runs without
        one."""
        whole, stale, missing = {}, [], []
        for run in runs:
            result = self.read(run)
            if result is None:
                missing.append(run)
            elif result["settings"] != json.loads(json.dumps(run.settings)):
                stale.append(run)
            else:
                whole[run.path] = result
        return whole, stale, missing


class Runner:
    """Runs what has no result, or one of other settings, and keeps each result as soon as it is whole.

    Args:
        results (`Results`): where results go. A run that fails leaves its messages there, in a `.log`.
        workers (`int`): runs at the same time, which share the processor's cores. While another is going on, one more
            starts only if as much memory is free as the largest run so far has needed.
    """

    def __init__(self, results: Results, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} runs nothing; write 1 or more.")
        self.results, self.workers = results, workers
        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or cores()
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, threads // workers))}
        self._processes: set[subprocess.Popen] = set()
        self._stopped = threading.Event()
        self._largest = FIRST_PEAK

    def __call__(self, runs: Sequence[Run]) -> int:
        """Run what is left to run. An interruption stops everything at once and leaves whole results only.

        Returns:
            How many runs failed.
        """
        whole, stale, _ = self.results.sort(runs)
        for run in stale:
            print(f"{run}: the result there is of other settings; it is run again.")
        pending = [run for run in runs if run.path not in whole]
        print(f"{len(whole)} of {len(runs)} runs have their result; {len(pending)} to run.", flush=True)
        failed, ended, start = 0, 0, time.perf_counter()
        bar = tqdm(total=len(pending), disable=None, unit="run")
        pool = ThreadPoolExecutor(self.workers)
        futures: dict[Future, Run] = {}
        waiting = list(pending)
        try:
            while waiting or futures:
                while waiting and len(futures) < self.workers and (not futures or self._fits()):
                    run = waiting.pop(0)
                    futures[pool.submit(self._run, run)] = run
                done, _ = wait(futures, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    run, outcome = futures.pop(future), future.result()
                    failed += "error" in outcome
                    ended += 1
                    left = (time.perf_counter() - start) / ended * (len(pending) - ended)
                    bar.update()
                    bar.write(f"[{ended}/{len(pending)}] {run}: {_told(outcome)}; {_time(left)} to go")
        finally:
            self._stopped.set()
            for process in list(self._processes):
                process.kill()
            pool.shutdown()
            bar.close()
        return failed

    def _fits(self) -> bool:
        return psutil.virtual_memory().available > self._largest

    def _run(self, run: Run) -> dict[str, Any]:
        """The result of a run, which is in its place then, or the error that it ended with."""
        target = self.results.folder / run.path
        target.parent.mkdir(parents=True, exist_ok=True)
        log = target.with_suffix(".log")
        with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as messages:
            path = Path(folder) / "result.json"
            process = subprocess.Popen(
                [*MEASURE, str(path)],
                stdin=subprocess.PIPE,
                stdout=messages,
                stderr=messages,
                text=True,
                env={**self.environment, "TMPDIR": folder},  # a killed run leaves nothing behind
            )
            self._processes.add(process)
            if self._stopped.is_set():
                process.kill()
            try:
                process.communicate(json.dumps(asdict(run)))
            except BrokenPipeError:
                process.wait()
            self._processes.discard(process)
            if process.returncode == 0:
                result = json.loads(path.read_text())
                self._largest = max(self._largest, result["peak_bytes"]["total"])
                write_json(result, target)
                log.unlink(missing_ok=True)
                return result
            messages.seek(0)
            told = messages.read()
        if not self._stopped.is_set():
            log.write_text(told)
        last = told.strip().splitlines()[-1:] or [f"it ended with {process.returncode}"]
        return {"error": f"failed: {last[0]} (all of it: {log})"}


def _told(outcome: dict[str, Any]) -> str:
    if "error" in outcome:
        return outcome["error"]
    return f"mean {100 * outcome['mean']:.1f} %, {_time(outcome['seconds']['total'])}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""Runs the experiments of a study, each run in a process of its own."""

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

from mmap_peft.multitask.processes import cores

from .predictions import keep_predictions
from .results_file import Results
from .run import Run


MEASURE = (sys.executable, "-m", "benchmark.measure")
FIRST_PEAK = 2**30  # bytes of memory that the first run is expected to need


class Runner:
    """Runs what has no result yet, or a result with other settings.

    Args:
        results (`Results`): where each result is stored when its run ends. The messages of a run that fails are
            written to the folder `logs` next to the results.
        workers (`int`): number of runs at the same time. They share the processor's cores. A further run starts only
            if as much memory is free as the largest run so far has needed.

    Raises:
        ValueError: `workers` is less than 1.
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
        """Run all of `runs` that have no result with their settings. An interruption stops all of them, and complete
        results are kept.

        Returns:
            The number of runs that failed.
        """
        current, stale, _ = self.results.sort(runs)
        for run in stale:
            print(f"{run}: the result there is of other settings; it is run again.")
        pending = [run for run in runs if run.name not in current]
        print(f"{len(current)} of {len(runs)} runs have their result; {len(pending)} to run.", flush=True)
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
                    bar.write(f"[{ended}/{len(pending)}] {run}: {_outcome_text(outcome)}; {_time(left)} to go")
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
        """Execute one run, and store its result or its messages.

        Returns:
            The result, or a dict whose `error` says why there is none.
        """
        log = self.results.folder / "logs" / f"{run.name}.log"
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
                predictions = path.with_suffix(".parquet")
                if predictions.is_file():  # before the line, so that no line is without its predictions
                    keep_predictions(predictions, self.results.folder, run.name)
                self._largest = max(self._largest, result["peak_bytes"]["total"])
                self.results.append(run, result)
                log.unlink(missing_ok=True)
                return result
            messages.seek(0)
            text = messages.read()
        if not self._stopped.is_set():
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(text)
        last = text.strip().splitlines()[-1:] or [f"it ended with {process.returncode}"]
        return {"error": f"failed: {last[0]} (all of it: {log})"}


def _outcome_text(outcome: dict[str, Any]) -> str:
    if "error" in outcome:
        return outcome["error"]
    return f"mean {100 * outcome['mean']:.1f} %, {_time(outcome['seconds']['total'])}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""The results of a study: one file of JSON lines, one line a run."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from .run import Run, run_name


RESULTS_FILE = "results.jsonl"


class Results:
    """A study's folder: its results in `results.jsonl`, and the tables and plots that are made from them.

    Of two lines with the same `run_name`, the later one counts.

    Args:
        folder: need not exist yet.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.path = self.folder / RESULTS_FILE

    def read(self) -> dict[str, dict[str, Any]]:
        """All results, by the name of their run. A last line that was only partly written is left out with a warning.

        Raises:
            ValueError: a line is not a result.
        """
        lines = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        results = {}
        for number, line in enumerate(lines, start=1):
            if number == len(lines) and not _is_json(line):  # `line` is what follows the last line break
                if line:
                    warnings.warn(f"The last line of {self.path} is incomplete and is ignored.", stacklevel=2)
                continue
            try:
                result = json.loads(line)
                result["settings"]
                results[run_name(result)] = result
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of {self.path} holds no result ({error!r}); remove it, and run the study again."
                ) from error
        return results

    def append(self, run: Run, result: dict[str, Any]) -> None:
        """Add the line of a run. Threads and processes that write at the same time wait for each other.

        Args:
            run (`Run`): which run.
            result (`dict`): what `measure` returned for it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"), open(self.path, "ab+") as file:
            file.seek(0)
            content = file.read()
            last = content[content.rfind(b"\n") + 1 :]
            if _is_json(last):
                file.write(b"\n")
            elif last:  # a writer was killed
                file.truncate(len(content) - len(last))
            file.write(json.dumps({**run.key, **result}).encode() + b"\n")

    def sort(self, runs: Sequence[Run]) -> tuple[dict[str, dict[str, Any]], list[Run], list[Run]]:
        """Compare the results with the settings of some runs.

        Returns:
            The results with the settings of their run, by `Run.name`; the runs whose result has other settings; the
            runs without a result.

        Raises:
            ValueError: a line is not a result.
        """
        results = self.read()
        current, stale, missing = {}, [], []
        for run in runs:
            result = results.get(run.name)
            if result is None:
                missing.append(run)
            elif result["settings"] != json.loads(json.dumps(run.settings)):
                stale.append(run)
            else:
                current[run.name] = result
        return current, stale, missing


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True

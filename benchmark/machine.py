"""Description of the machine and the code of a measurement, and peak memory of this process."""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mmap_peft
from mmap_peft.multitask.record import versions


_PACKAGE = Path(mmap_peft.__file__).parent
_peak_before = 0  # the highest peak before the last call of `reset_peak_memory`


def peak_memory() -> int:
    """Peak memory in bytes since the start of the process, or since the last `reset_peak_memory`: what torch
    allocated on the GPU, or without a GPU what the whole process held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        # Not getrusage: its peak begins with the size of the process that started this one.
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        import resource  # Windows lacks it

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def total_peak_memory() -> int:
    """As `peak_memory`, but always since the start of the process."""
    return max(_peak_before, peak_memory())


def can_reset_peak_memory() -> bool:
    """Whether `reset_peak_memory` has an effect: on a GPU and on Linux."""
    return torch.cuda.is_available() or Path("/proc/self/clear_refs").exists()


def reset_peak_memory() -> None:
    """Reset `peak_memory` to the memory in use now. Does nothing where the system does not support it."""
    global _peak_before
    _peak_before = total_peak_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def origin() -> dict[str, Any]:
    """Machine and code of a measurement.

    Returns:
        `machine` (`device`, `system`, `threads`) and `code` (`versions`; `commit` and `changed`, see `_commit`).
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    machine = {"device": device, "system": platform.system(), "threads": torch.get_num_threads()}
    return {"machine": machine, "code": {"versions": versions(), **_commit()}}


def _commit() -> dict[str, Any]:
    """The commit that is checked out, and whether the files of the package or of the benchmark differ from it; both
    are `None` if the package does not lie in a repository of its own."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails in a repository that only holds the environment
        changes = git("status", "--porcelain", "--", ".", ":(top)benchmark/*.py")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed": None}

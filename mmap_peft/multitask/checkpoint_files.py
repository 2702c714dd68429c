"""The files of a checkpoint: written beside, renamed when whole, and compared with their SHA-256 before they are used.

`checkpoint-7` is written as `checkpoint-7.partial/checkpoint-7`. Its `checkpoint.json` is written last and has the
SHA-256 of all other files.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_pt_utils import safe_globals
from typing_extensions import NotRequired, TypedDict  # pydantic needs this one before Python 3.12

from ..checking import checked
from .files import PART, read_json, write_json
from .replacing import flush, lock, sha256


MANIFEST = "checkpoint.json"
PARTIAL = ".partial"
STATE_FILE = "multitask_state.json"
GRADIENTS_FILE = "gradients.safetensors"  # in checkpoints of stage 1 only: the snapshots so far
NEEDED = ("trainer_state.json", STATE_FILE, "tasks.json")


class State(TypedDict):
    """`multitask_state.json`."""

    sampling: str
    order: dict[str, Any] | None
    augment: NotRequired[str]  # without it: "none"


@contextlib.contextmanager
def new_checkpoint(checkpoint: Path) -> Iterator[Path]:
    """Inside the `with` block, write a checkpoint into the path that it gets; at its end it has its own name."""
    new = partial(checkpoint)
    new.parent.mkdir(parents=True, exist_ok=True)
    with lock(new.parent):  # another training may write the same checkpoint
        shutil.rmtree(new, ignore_errors=True)
        new.parent.mkdir(exist_ok=True)
        try:
            yield new
            files = [path for path in sorted(new.rglob("*")) if path.is_file()]
            for path in files:
                flush(path)
            write_json({path.relative_to(new).as_posix(): sha256(path) for path in files}, new / MANIFEST)
            _rename(new, checkpoint)
            shutil.rmtree(new.parent, ignore_errors=True)
        finally:
            if not (new / MANIFEST).exists():  # what is whole is renamed at the next start
                shutil.rmtree(new.parent, ignore_errors=True)


def partial(checkpoint: Path) -> Path:
    """Where a checkpoint is written."""
    return Path(f"{checkpoint}{PARTIAL}", checkpoint.name)


def _rename(new: Path, checkpoint: Path) -> None:
    if checkpoint.exists():  # of an earlier run
        checkpoint.rename(new.parent / "replaced")
    new.rename(checkpoint)
    flush(checkpoint.parent)


def remove_leftovers(output: Path) -> None:
    """Rename checkpoints that were whole when their process ended, and remove those that were not."""
    for folder in output.glob(f"checkpoint-*{PARTIAL}"):
        with contextlib.suppress(OSError), lock(folder, seconds=0):  # an error: its process still writes it
            checkpoint = Path(str(folder).removesuffix(PARTIAL))
            if (folder / checkpoint.name / MANIFEST).exists() and problem(folder / checkpoint.name) is None:
                _rename(folder / checkpoint.name, checkpoint)
            elif (folder / "replaced").exists() and not checkpoint.exists():
                (folder / "replaced").rename(checkpoint)
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError), lock(output, seconds=0):
        for part in output.glob(f"*{PART}"):
            part.unlink()


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints in a folder, the last one first."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step), key=lambda path: -int(steps[path][1]))


def problem(checkpoint: Path) -> str | None:
    """A sentence that says why training cannot go on from a checkpoint, or `None` if it can."""
    try:
        _check(checkpoint)
    except OSError as error:
        return f"{checkpoint} cannot be read ({str(error)[:300]}); resume from another checkpoint."
    except ValueError as error:
        return str(error)
    return None


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """What the `multitask_state.json` of a checkpoint holds. Raises a `ValueError` if it is of another form."""
    content = read_json(checkpoint / STATE_FILE)
    if isinstance(content, dict) and {"snapshots", "gradients"} & content.keys():
        raise ValueError(
            f"{checkpoint} is a checkpoint of stage 1 of an early version, without {GRADIENTS_FILE}; start stage 1 "
            "again, or resume from a checkpoint of stage 2."
        )
    return checked(content, State, STATE_FILE)


def _check(checkpoint: Path) -> None:
    manifest = checkpoint / MANIFEST
    digests = checked(read_json(manifest), dict[str, str], MANIFEST) if manifest.exists() else {}
    for name, digest in digests.items():
        path = checkpoint / name
        if not path.is_file() or sha256(path) != digest:
            raise ValueError(f"{path} is {'damaged' if path.is_file() else 'missing'}, so nothing was loaded.")
    names = {path.name for path in checkpoint.iterdir()} if checkpoint.is_dir() else set()
    for name in NEEDED:
        if name not in names:
            raise ValueError(
                f"{checkpoint} is no checkpoint to resume from (it has no {name}); give a folder `checkpoint-<step>` "
                "that this trainer wrote."
            )
    saved_state(checkpoint)
    checked(read_json(checkpoint / "trainer_state.json", finite=False), dict[str, Any], "trainer_state.json")
    for part in ("optimizer", "scheduler", "rng_state"):
        # DeepSpeed keeps optimizer and scheduler in a folder of its own.
        parts = (part,) if part == "rng_state" else (part, "global_step")
        if not any(name.startswith(parts) for name in names):
            raise ValueError(
                f"{checkpoint} has no state of the {part.replace('rng_state', 'random numbers')}, so training cannot "
                "go on as it was; resume from another checkpoint, or load its adapters with load_adapters. "
                "save_only_model=True leaves this state out."
            )
    if not digests:  # saved by an early version
        for path in checkpoint.glob("*.pt*"):
            _check_tensors(path)


def _check_tensors(path: Path) -> None:
    try:
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise exceptions of many kinds
        reason = str(error).split("\n")[0][:150]
        raise ValueError(f"{path} is damaged ({reason}); resume from another checkpoint.") from error

"""Reading and writing single files so that damaged ones do no harm and a crash damages none."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .replacing import flush, lock


LARGEST_JSON = 64 * 2**20  # bytes
PART = ".part"
DTYPES = {"F16", "BF16", "F32", "F64"}  # in safetensors


@contextlib.contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[Path]:
    """Replace a file by what the `with` block writes into the path that it gets; other processes wait meanwhile."""
    new = Path(f"{path}{PART}")
    with lock(new.parent):  # so that the new file is of one process, or was left by one that ended
        try:
            yield new
            flush(new)
            new.replace(path)
            flush(new.parent)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def write_json(fields: dict[str, Any], path: str | os.PathLike) -> None:
    """Write fields to a JSON file, which replaces an older one."""
    with replace_file(path) as new:
        new.write_text(json.dumps(fields, indent=1), encoding="utf-8")


def check_file(path: Path, most_bytes: float = float("inf")) -> None:
    """Raise a `ValueError` if a path is no file, such as a device that never ends, or larger than allowed."""
    try:
        state = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a folder that has it.") from error
    except ValueError as error:  # a zero in the name
        raise ValueError(f"{path!r} cannot be the name of a file.") from error
    if not stat.S_ISREG(state.st_mode):
        raise ValueError(f"{path} is no regular file; give a folder that holds the file itself.")
    if state.st_size > most_bytes:
        raise ValueError(f"{path} has {state.st_size} bytes, more than the {most_bytes:.0f} that it can need.")


def read_json(path: Path, finite: bool = True) -> Any:
    """The content of a JSON file from anywhere. Without `finite`, it may hold NaN and infinity.

    Raises:
        ValueError: it is no regular file, too large, not UTF-8, not JSON, too deep, or has a key twice or a number
            that is not finite. The error names the file.
    """
    check_file(path, LARGEST_JSON)

    def number(text: str) -> float:
        value = float(text)
        if finite and not math.isfinite(value):
            raise ValueError(f"{text[:20]} is no finite number")
        return value

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice[:60]!r} is there twice")
        return result

    try:
        text = path.read_bytes().decode("utf-8-sig")
        content = json.loads(text, parse_float=number, parse_constant=number, object_pairs_hook=fields)
        json.dumps(content, ensure_ascii=False).encode()  # half of a character, such as "\\ud800", cannot be written
        return content
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file that can be used ({str(error)[:200]}); restore it.") from error


def read_tensors(path: Path, finite: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file from anywhere. Without `finite`, they may hold NaN and infinity.

    Raises:
        ValueError: a damaged file, or numbers that are not finite.
    """
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, no mapping
            wrong = next((name for name, dtype in dtypes.items() if dtype not in DTYPES), None)
            if wrong is not None:
                raise ValueError(f"{wrong[:60]!r} is of the dtype {dtypes[wrong]}")
            tensors = {name: file.get_tensor(name) for name in dtypes}
        for name, tensor in tensors.items():
            if finite and not tensor.isfinite().all():
                raise ValueError(f"{name[:60]!r} holds numbers that are not finite")
    except Exception as error:  # safetensors raises several kinds of its own exceptions for damaged files
        raise ValueError(f"{path} is missing or damaged ({str(error)[:200]}); nothing was loaded.") from error
    return tensors

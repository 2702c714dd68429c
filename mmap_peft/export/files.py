"""An exported task as a file."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from .task_classifier import TaskClassifier


def export(
    make: Callable[[], TaskClassifier], adapter: str, format: str = "torch", path: str | os.PathLike | None = None
) -> TaskClassifier | Path:
    """Make the classifier of a task, and write it to a file if that is wanted.

    Args:
        make: makes it, after the other arguments are checked.
        adapter (`str`): name of the task's adapter, for the file.
        format, path: as for `MultiTaskClassifier.export`.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is none that a task can be exported to; write 'torch' or 'onnx'.")
    if format == "onnx":
        _check_packages()
        path = "." if path is None else path
    target = None if path is None else _target(Path(path), adapter, format)
    exported = make()
    if target is not None:
        _write(exported, target, format)
    return exported if format == "torch" else target


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"format='onnx' needs the package {' and '.join(missing)}, which is not there; write "
            "pip install mmap_peft[onnx]."
        )


def _target(path: Path, adapter: str, format: str) -> Path:
    suffix = FORMATS[format][0]
    path = path / f"{adapter}{suffix}" if path.is_dir() else path
    if path.suffix != suffix:
        raise ValueError(
            f"path={str(path)!r} is no folder that is there, and no file for format={format!r}; let it end in "
            f"{suffix!r}."
        )
    return path


def _write(exported: TaskClassifier, target: Path, format: str) -> None:
    on_cpu = copy.deepcopy(exported).cpu()  # a file needs no accelerator; the caller's module stays where it is
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exporting-") as folder:
        beside = Path(folder) / target.name
        FORMATS[format][1](on_cpu, beside)
        # ONNX keeps weights of 2 GB and more in a file of their own; the model, which names it, comes last.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == beside):
            os.replace(file, target.parent / file.name)


def _example(exported: TaskClassifier) -> torch.Tensor:
    # Two, since a batch of one would be taken for the only size there is.
    return torch.zeros(2, 3, exported.image_size, exported.image_size)


def _write_torch(exported: TaskClassifier, path: Path) -> None:
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(exported, (_example(exported),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, path, extra_files=exported.metadata)


def _write_onnx(exported: TaskClassifier, path: Path) -> None:
    program = torch.onnx.export(
        exported,
        (_example(exported),),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=["probabilities"],
        dynamic_shapes={"pixel_values": {0: "batch"}},
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces here
    program.model.metadata_props.update(exported.metadata)
    program.save(path)


FORMATS = {"torch": (".pt2", _write_torch), "onnx": (".onnx", _write_onnx)}

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


SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}


def export(
    make: Callable[[], TaskClassifier], adapter: str, format: str = "torch", path: str | os.PathLike | None = None
) -> TaskClassifier | Path:
    """Make the classifier of a task, and write it to a file if `path` or `format` ask for one.

    Args:
        make: returns the classifier; called after the other arguments are checked.
        adapter (`str`): name of the task's adapter, which the file gets if `path` is a folder.
        format, path: as for `MultiTaskClassifier.export`.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format={format!r} is none of the export formats; write 'torch' or 'onnx'.")
    if format == "onnx":
        missing = " and ".join(name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None)
        if missing:
            raise ImportError(
                f"format='onnx' needs the package {missing}, which is missing; write pip install mmap_peft[onnx]."
            )
        path = "." if path is None else path
    if path is None:
        return make()
    target, suffix = Path(path), SUFFIXES[format]
    target = target / f"{adapter}{suffix}" if target.is_dir() else target
    if target.suffix != suffix:
        raise ValueError(
            f"path={str(target)!r} is no folder that exists and no file for {format}; let it end in {suffix!r}."
        )
    exported = make()
    _write(exported, target)
    return exported if format == "torch" else target


def _write(exported: TaskClassifier, target: Path) -> None:
    on_cpu = copy.deepcopy(exported).cpu()  # a file needs no accelerator; the caller's module stays where it is
    pixels = torch.zeros(2, 3, exported.image_size, exported.image_size)  # with one, torch would fix the batch size
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".exporting-") as folder:
        new_file = Path(folder) / target.name
        (_write_onnx if target.suffix == SUFFIXES["onnx"] else _write_torch)(on_cpu, pixels, new_file)
        # ONNX keeps weights of 2 GB and more in a second file; the model, which names this file, is moved last.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == new_file):
            os.replace(file, target.parent / file.name)


def _write_torch(exported: TaskClassifier, pixels: torch.Tensor, path: Path) -> None:
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(exported, (pixels,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, path, extra_files=exported.metadata)


def _write_onnx(exported: TaskClassifier, pixels: torch.Tensor, path: Path) -> None:
    names = {"input_names": ["pixel_values"], "output_names": ["probabilities"]}
    shapes = {"pixel_values": {0: "batch"}}
    program = torch.onnx.export(exported, (pixels,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, with paths of this machine
    program.model.metadata_props.update(exported.metadata)
    program.save(path)

"""Write one task of a model to a file for ONNX runtimes, or for torch.export.load.

    mmap-peft export out/photos --format onnx
    mmap-peft export out/office --task art --format torch --output art.pt2

Pixels go in, probabilities come out: see docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from ..export.files import SUFFIXES
from .parsing import CommandParser
from .reading import MODEL_HELP, read_model


@dataclass
class ExportArguments:
    """The arguments of the command."""

    task: Optional[str] = field(default=None, metadata={"help": "the task; can be left out if there is one only"})
    format: str = field(default="onnx", metadata={"help": "the kind of file", "choices": sorted(SUFFIXES)})
    output: str = field(default=".", metadata={"help": "file to write, .onnx or .pt2, or a folder for it"})
    class_names: Optional[list[str]] = field(
        default=None, metadata={"help": "classes to choose among, instead of the task's", "nargs": "+"}
    )
    templates: Optional[list[str]] = field(
        default=None, metadata={"help": "texts of a class, with {} for its name, instead of the task's", "nargs": "+"}
    )


def main(argv: Sequence[str]) -> None:
    parser = CommandParser("mmap-peft export", [ExportArguments], __doc__, {"model": MODEL_HELP})
    own, place, _ = parser.parse(argv)
    classifier = read_model(place.model)
    task = next(iter(classifier.tasks)) if own.task is None and len(classifier.tasks) == 1 else own.task
    if task is None:
        raise ValueError(f"The model has several tasks; write --task with one of {', '.join(classifier.tasks)}.")
    classifier.export(task, own.format, own.output, own.class_names, own.templates)
    target = Path(own.output)
    print(target / f"{classifier.tasks[task].adapter}{SUFFIXES[own.format]}" if target.is_dir() else target)

"""Predict the classes of images, as CSV or lines of JSON.

    mmap-peft predict out/photos image.jpg
    mmap-peft predict out/photos pictures '**/*.png' --top 3 --output classes.csv

The exit code is 1 if some files could not be read; they are named on stderr, and all others are
predicted.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TextIO

from transformers.utils.logging import tqdm

from ..checking import Count, checked
from ..data.folders import ImageTree, short
from ..multitask.classifier import MultiTaskClassifier
from ..multitask.decoding import decode
from .parsing import CommandParser
from .reading import MODEL_HELP, read_model
from .writing import written


FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl"}  # by the ending of --output


@dataclass
class PredictArguments:
    """The arguments of the command."""

    task: Optional[str] = field(
        default=None, metadata={"help": "task of the images; without, each image's task is found by prototypes"}
    )
    top: int = field(default=1, metadata={"help": "number of classes to list for an image"})
    class_names: Optional[list[str]] = field(
        default=None, metadata={"help": "classes to choose among, instead of the task's", "nargs": "+"}
    )
    output: Optional[str] = field(
        default=None, metadata={"help": "file to write when all is predicted: .csv or .jsonl; without, stdout"}
    )
    format: Optional[str] = field(
        default=None,
        metadata={"help": "csv or jsonl; without, by the ending of --output", "choices": ["csv", "jsonl"]},
    )
    batch_size: int = field(default=32, metadata={"help": "images that are computed at a time"})


def main(argv: Sequence[str]) -> int:
    places = {"model": MODEL_HELP, "files": "files, folders with all images in them, or patterns such as '**/*.jpg'"}
    own, place, _ = CommandParser("mmap-peft predict", [PredictArguments], __doc__, places).parse(argv)
    for name in ("top", "batch_size"):
        checked(getattr(own, name), Count, name)
    form = own.format or FORMATS.get(os.path.splitext(own.output or "")[1].lower(), "csv")
    files, classifier = find_files(place.files), read_model(place.model)
    task = _task(classifier, own.task)
    with written(own.output) as target:
        write = _write_csv if form == "csv" else _write_json
        unread: list[str] = []
        write(target, own.top, _predictions(classifier, files, task, own, unread))
    for name in unread:
        print(name, file=sys.stderr)
    if unread:
        print(f"{len(unread)} of {len(files)} files could not be read.", file=sys.stderr)
    return 1 if unread else 0


def find_files(names: Iterable[str]) -> list[str]:
    """The files that files, folders and patterns name, each once. Files that are missing stay, to be told later.

    Raises:
        ValueError: a folder without images, or a pattern that matches nothing.
    """
    files: list[str] = []
    for name in names:
        if os.path.isdir(name):
            found = [
                os.path.join(name, *parts, file)
                for parts, images in sorted(ImageTree.scan(Path(name)).images.items())
                for file in images
            ]
        elif os.path.exists(name) or not glob.has_magic(name):
            found = [name]
        else:
            found = [each for each in sorted(glob.glob(name, recursive=True)) if os.path.isfile(each)]
        if not found:
            raise ValueError(f"{short(name)} holds no image; give files, folders of images or patterns.")
        files += found
    return list(dict.fromkeys(files))


def finds_tasks(classifier: MultiTaskClassifier) -> bool:
    """Whether there are prototypes of all tasks, which find the task of an image."""
    prototypes = classifier.prototypes
    return prototypes is not None and classifier.tasks.keys() <= prototypes.features.keys()


def class_names_of(
    found: Any, classifier: MultiTaskClassifier, task: str | None, given: list[str] | None
) -> list[str]:
    """The class names of the columns of `found.probabilities`; `found` is what `classifier.predict` returned for a
    task and the classes that were given."""
    return getattr(found, "class_names", None) or given or classifier.tasks[task].class_names


def _task(classifier: MultiTaskClassifier, task: str | None) -> str | None:
    """The task of the images, or `None` if the prototypes find it."""
    names = list(classifier.tasks)
    if task is not None:
        classifier.check_task(task)
    elif len(names) == 1:
        return names[0]
    elif not finds_tasks(classifier):
        raise ValueError(
            f"The model has no prototypes, which find an image's task; write --task with one of {', '.join(names)}."
        )
    return task


def _predictions(
    classifier: MultiTaskClassifier, files: Sequence[str], task: str | None, own: PredictArguments, unread: list[str]
) -> Iterator[tuple[str, str, list[tuple[str, float]]]]:
    """For each file that can be read its name, its task, and the most probable classes with their probabilities."""
    for start in tqdm(range(0, len(files), own.batch_size), desc="Images", unit="batch"):
        names, images = [], []
        for file in files[start : start + own.batch_size]:
            try:
                images.append(decode(file))
                names.append(_printable(file))
            except ValueError as error:
                unread.append(f"{_printable(file)} cannot be read: {error}.")
        if not images:
            continue
        found = classifier.predict(images, task, class_names=own.class_names)
        classes = class_names_of(found, classifier, task, own.class_names)
        best = found.probabilities.topk(min(own.top, len(classes)))
        for row, name in enumerate(names):
            chosen = zip(best.indices[row].tolist(), best.values[row].tolist())
            top = [(classes[number], round(value, 6)) for number, value in chosen]
            yield name, task or found.tasks[row], top


def _write_csv(target: TextIO, top: int, rows: Iterable[tuple[str, str, list[tuple[str, float]]]]) -> None:
    writer = csv.writer(target, lineterminator="\n")
    more = [f"{column}_{number}" for number in range(2, top + 1) for column in ("label", "probability")]
    writer.writerow(["file", "task", "label", "probability", *more])
    for file, task, classes in rows:
        writer.writerow([file, task, *(cell for pair in classes for cell in pair)])


def _write_json(target: TextIO, top: int, rows: Iterable[tuple[str, str, list[tuple[str, float]]]]) -> None:
    for file, task, classes in rows:
        labels: list[dict[str, Any]] = [{"label": label, "probability": value} for label, value in classes]
        target.write(json.dumps({"file": file, "task": task, "classes": labels}, ensure_ascii=False) + "\n")


def _printable(file: str) -> str:
    """A file's name; bytes that are no UTF-8 are written as `\\\\xff`."""
    return file.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

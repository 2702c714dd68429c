"""Measure the accuracy of a model on images in folders, or on a data set of the Hub.

    mmap-peft evaluate out/photos photos
    mmap-peft evaluate me/clip-mmap-office office --zero_shot

On the data of the training it uses the images that training held out, which the model's folder
names in split.json; else the folders called test or val; else all images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np

from ..multitask.classifier import MultiTaskClassifier
from ..multitask.files import write_json
from ..multitask.images import IGNORE_INDEX
from .measuring import Found, MeasuringArguments, give_images, measure
from .parsing import CommandParser
from .reading import DATA_HELP, MODEL_HELP, read_data, read_model, read_split
from .results import table


@dataclass
class EvaluateArguments:
    """The arguments of the command."""

    task: Optional[str] = field(
        default=None, metadata={"help": "task of all images; without, that which is called as their domain"}
    )
    all_images: bool = field(default=False, metadata={"help": "use all images, those that trained as well"})
    zero_shot: bool = field(default=False, metadata={"help": "measure the plain CLIP as well"})
    output: Optional[str] = field(default=None, metadata={"help": "JSON file of the accuracies to write"})


def main(argv: Sequence[str]) -> None:
    places = {"model": MODEL_HELP, "data": DATA_HELP}
    types = [EvaluateArguments, MeasuringArguments]
    own, how, place, _ = CommandParser("mmap-peft evaluate", types, __doc__, places).parse(argv)
    classifier, domains = read_model(place.model), read_data(place.data)
    if own.all_images:
        domains = {
            name: data.remove_columns({"split"}.intersection(data.column_names)) for name, data in domains.items()
        }
    which = give_images(classifier, domains, None if own.all_images else read_split(place.model), own.task)
    which = "all images, as --all_images says" if own.all_images else which
    print(f"Evaluates {which}.", file=sys.stderr)
    found = {"accuracy": measure(classifier, how)}
    if own.zero_shot:
        with classifier.zero_shot():
            found = {"zero-shot": measure(classifier, how, "Plain CLIP"), **found}
    print(*_table(classifier, found), sep="\n")
    if own.output:
        metrics: dict[str, Any] = {name: each.accuracies(classifier.tasks) for name, each in found.items()}
        write_json({"model": place.model, "images": which, **metrics}, own.output)


def _table(classifier: MultiTaskClassifier, found: dict[str, Found]) -> list[str]:
    metrics = {name: each.accuracies(classifier.tasks) for name, each in found.items()}
    first = found["accuracy"]
    read = first.task_ids[first.labels != IGNORE_INDEX]
    counts = dict(zip(classifier.tasks, np.bincount(read, minlength=len(classifier.tasks)).tolist()))
    keys = {task.adapter: (name, counts[name]) for name, task in classifier.tasks.items() if counts[name]}
    keys |= {name: (name, "") for name in ("mean", "worst") if len(keys) > 1}
    rows = [
        [name, str(count), *(f"{100 * each[f'{key}_accuracy']:.1f} %" for each in metrics.values())]
        for key, (name, count) in keys.items()
    ]
    return table(["task", "images", *metrics], rows)

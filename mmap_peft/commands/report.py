"""Write a report of a model as one HTML page: accuracies, mistakes, groups, training.

    mmap-peft report out/photos --data photos
    mmap-peft report me/clip-mmap-office --output office.html

With --data, the page has the accuracy of each class, confusion matrices and pictures of the
mistakes; without, what the model's folder knows. It needs no other file and no network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import jinja2
import numpy as np

from ..checking import Amount, checked
from ..hub.repository import shown_base
from ..multitask.classifier import MultiTaskClassifier
from ..multitask.files import read_json
from ..multitask.images import IGNORE_INDEX
from ..multitask.task import Task
from .info import info
from .measuring import Found, MeasuringArguments, give_images, measure
from .parsing import CommandParser
from .reading import DATA_HELP, MODEL_HELP, read_data, read_model, read_split
from .report_pictures import confusion_matrix, heat_map, thumbnail, training_curves
from .writing import written


@dataclass
class ReportArguments:
    """The arguments of the command."""

    data: Optional[str] = field(default=None, metadata={"help": DATA_HELP})
    task: Optional[str] = field(
        default=None, metadata={"help": "task of all images of --data; without, that which is called as their domain"}
    )
    output: Optional[str] = field(
        default=None, metadata={"help": "the page to write; without, report.html in the model's folder"}
    )
    mistakes: int = field(default=24, metadata={"help": "largest number of pictures of mistakes of a task"})


def main(argv: Sequence[str]) -> None:
    types = [ReportArguments, MeasuringArguments]
    own, how, place, _ = CommandParser("mmap-peft report", types, __doc__, {"model": MODEL_HELP}).parse(argv)
    checked(own.mistakes, Amount, "mistakes")
    classifier, folder = read_model(place.model), Path(place.model)
    values: dict[str, Any] = {"name": os.path.basename(os.path.abspath(place.model)), "which": None, "parts": []}
    values |= {"about": info(classifier), "base": shown_base(classifier.clip.name_or_path), **_of_folder(folder)}
    if own.data is not None:
        domains = read_data(own.data)
        values["which"] = give_images(classifier, domains, read_split(place.model), own.task)
        found = measure(classifier, how)
        values["parts"] = _of_tasks(classifier, found, own.mistakes)
    if classifier.grouping is not None and classifier.grouping.similarity is not None:
        values["heat_map"] = heat_map(classifier.grouping)
    output = own.output or (folder / "report.html" if folder.is_dir() else "report.html")
    template = Path(__file__).with_name("report_template.html").read_text("utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(template)
    with written(output) as file:
        file.write(page.render({"heat_map": None, **values}))
    print(output)


def _of_folder(folder: Path) -> dict[str, Any]:
    """Curves and time of training, if the folder has the logs of its trainer."""
    seconds, curves = None, {}
    if (folder / "results.json").is_file():
        seconds = read_json(folder / "results.json").get("seconds")
    for stage, place in (("stage 1: one adapter of all tasks", folder / "grouping"), ("training", folder)):
        states = [place / "trainer_state.json", *place.glob("checkpoint-*/trainer_state.json")]
        states = [path for path in states if path.is_file()]
        logs = read_json(max(states, key=os.path.getmtime), finite=False).get("log_history", []) if states else []
        curves[stage] = [entry for entry in logs if "loss" in entry or "eval_mean_accuracy" in entry]
    curves = {stage: logs for stage, logs in curves.items() if logs}
    return {"seconds": seconds, "curves": training_curves(curves) if curves else None}


def _of_tasks(classifier: MultiTaskClassifier, found: Found, most: int) -> list[dict[str, Any]]:
    """For each task that has images its accuracies, its confusion matrix, and its mistakes."""
    parts = []
    for number, task in enumerate(classifier.tasks.values()):
        rows = np.flatnonzero((found.task_ids == number) & (found.labels != IGNORE_INDEX))
        if not len(rows):
            continue
        true, predicted = found.labels[rows], found.predicted.reshape(len(found.labels), -1)[rows, 0]
        counts = np.zeros((len(task.class_names),) * 2, dtype=int)
        np.add.at(counts, (true, predicted), 1)
        first = int(np.flatnonzero(found.task_ids == number)[0])
        wrong = np.flatnonzero(true != predicted)
        wrong = wrong[np.argsort(-found.probability[rows[wrong]], kind="stable")]
        parts.append(
            {
                "name": task.name,
                "images": len(rows),
                "accuracy": float((true == predicted).mean()),
                "zero_shot": classifier.record.zero_shot.get(task.name),
                "classes": _classes(task, counts),
                "matrix": confusion_matrix(counts, task.class_names),
                "wrong": len(wrong),
                "mistakes": [
                    {
                        "picture": thumbnail(task.eval, int(rows[row]) - first),
                        "file": str(task.eval[int(rows[row]) - first]["file"]),
                        "true": task.class_names[true[row]],
                        "predicted": task.class_names[predicted[row]],
                        "probability": float(found.probability[rows[row]]),
                    }
                    for row in wrong[:most]
                ],
            }
        )
    return parts


def _classes(task: Task, counts: np.ndarray) -> list[dict[str, Any]]:
    """For each class the number of its images, its accuracy, and the class that it is taken for most often."""
    classes = []
    for number, name in enumerate(task.class_names):
        row, others = counts[number], counts[number].copy()
        others[number] = 0
        classes.append(
            {
                "name": name,
                "images": int(row.sum()),
                "accuracy": float(row[number] / row.sum()) if row.sum() else None,
                "taken_for": task.class_names[int(others.argmax())] if others.any() else "",
            }
        )
    return classes

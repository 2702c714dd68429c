"""Show a model's tasks, classes, groups, adapters, parameters, base and versions.

    mmap-peft info out/photos
    mmap-peft info me/clip-mmap-office --json

The tables are Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..multitask.classifier import MultiTaskClassifier
from .parsing import CommandParser
from .reading import MODEL_HELP, read_model
from .results import table


@dataclass
class InfoArguments:
    """The arguments of the command."""

    json: bool = field(default=False, metadata={"help": "print JSON, with all class names"})


def main(argv: Sequence[str]) -> None:
    own, place, _ = CommandParser("mmap-peft info", [InfoArguments], __doc__, {"model": MODEL_HELP}).parse(argv)
    found = info(read_model(place.model))
    print(json.dumps(found, indent=1, ensure_ascii=False) if own.json else _text(found))


def info(classifier: MultiTaskClassifier) -> dict[str, Any]:
    """What is known of a model, as JSON values."""
    record, grouping, config = classifier.record, classifier.grouping, classifier.adapter_config
    sizes = {name: classifier.adapter_size(name) for name in classifier.adapters}
    tasks = {
        name: {
            "classes": task.class_names,
            "template": task.template,
            "adapters": list(classifier.routes[name]),
            "dataset": task.dataset,
            "zero_shot": record.zero_shot.get(name),
            "accuracy": record.prompted.get(name),
            "prototypes": classifier.prototypes is not None and name in classifier.prototypes.features,
        }
        for name, task in classifier.tasks.items()
    }
    return {
        "method": type(config).__name__.removesuffix("Config"),
        "base": classifier.clip.name_or_path,
        "base_parameters": classifier.base_size,
        "parameters": sum(sizes.values()),
        "adapters": sizes,
        "tasks": tasks,
        "groups": None if grouping is None else grouping.groups,
        "remarks": [] if grouping is None else grouping.remarks,
        "settings": record.settings,
        "command": record.command,
        "license": record.license,
        "versions": record.versions,
    }


def task_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of the tasks and their accuracies, from what `info` returns."""
    rows = [
        [name, str(len(task["classes"])), percent(task["zero_shot"]), percent(task["accuracy"])]
        + [" + ".join(task["adapters"]), "yes" if task["prototypes"] else "no"]
        for name, task in found["tasks"].items()
    ]
    return ["task", "classes", "zero-shot", "trained", "adapters", "prototypes"], rows


def trained_parameters(found: dict[str, Any]) -> str:
    """The number of trained parameters and their share of the base, from what `info` returns."""
    return f"{found['parameters']:,}, {100 * found['parameters'] / found['base_parameters']:.3g} % of the base"


def percent(share: float | None) -> str:
    """A share in percent; `""` for `None`."""
    return "" if share is None else f"{100 * share:.1f} %"


def _text(found: dict[str, Any]) -> str:
    adapters = [[name, f"{size:,}"] for name, size in found["adapters"].items()]
    about = {
        "method": found["method"],
        "base": found["base"],
        "trained parameters": trained_parameters(found),
        "groups": "; ".join(", ".join(group) for group in found["groups"] or []),
        "settings": ", ".join(f"{name}={value}" for name, value in found["settings"].items()),
        "command": found["command"],
        "license": found["license"],
        "versions": ", ".join(f"{name} {value}" for name, value in found["versions"].items()),
    }
    parts = [
        table(*task_table(found)),
        table(["adapter", "parameters"], adapters),
        table(["", ""], [[name, value] for name, value in about.items() if value], texts=2),
        found["remarks"],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)

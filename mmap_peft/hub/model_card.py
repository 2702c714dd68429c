"""The README of a saved classifier: `model_card_template.md` and the values that it shows."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markupsafe import Markup
from peft import PeftConfig

from ..prompts.base import PromptConfig
from ..registration import known_methods
from ..tuner.model import ENCODER_LAYERS
from .repository import hub_id


@dataclass(frozen=True)
class ClassifierDescription:
    """What a model card says about a classifier.

    Args:
        base_model, adapters, tasks, training, grouping: as in `tasks.json`.
        config (`PeftConfig`): the method and its settings.
        base_class (`str`): name of the base model's class, shown if the base model has no name.
        adapter_parameters, base_parameters (`int`): numbers of parameters of all adapters together, and of the base.
    """

    base_model: str | None
    adapters: list[str]
    tasks: list[dict[str, Any]]
    training: dict[str, Any]
    grouping: dict[str, Any] | None
    config: PeftConfig
    base_class: str
    adapter_parameters: int
    base_parameters: int

    @property
    def prompted(self) -> bool:
        return isinstance(self.config, PromptConfig)


class MarkdownText(str):
    """Text that a template with autoescape writes on one line, so that Markdown shows it as it is, in a table too."""

    def __html__(self) -> str:
        return re.sub(r"([\\`*\[\]<>~|&$]|\b_|_\b)", r"\\\1", _one_line(self))


def model_card(
    description: ClassifierDescription, repo_id: str | None = None, subfolder: str | None = None
) -> ModelCard:
    """A card that says what the adapters are for, how good they are, how they were trained, and how to load them.

    Args:
        description (`ClassifierDescription`): the classifier.
        repo_id, subfolder (`str`, *optional*): where the card will stand, for the lines that load the classifier.
    """
    config, base_id = description.config, hub_id(description.base_model)
    known_method = known_methods().get(config.peft_type)
    method = type(config).__name__.removesuffix("Config")
    if description.prompted:
        method = f"{method} prompts"
    elif known_method:
        method = known_method.name
    # Of a path the last folder: the others say nothing on another machine.
    base = base_id or PurePath(description.base_model or "").name or description.base_class
    title = f"{method} of {len(description.tasks)} tasks for {base}"
    values = {
        **vars(description),
        **_task_table(description),
        "title": title,
        "method": method,
        "base": _link(base_id, base),
        "base_is_local": base_id is None,
        "prompted": description.prompted,
        "settings": _settings(config),
        "is_mmap": config.peft_type == "MMAP",
        "source": known_method and known_method.source,
        "class_lists": _class_lists(description.tasks),
        "repo_id": _literal(repo_id or "your-name/your-repository"),
        "subfolder": subfolder and _literal(subfolder),
        "example_task": _literal(description.tasks[0]["name"]),
    }
    metadata = _metadata(description, repo_id.split("/")[-1] if repo_id else title)
    template = Path(__file__).with_name("model_card_template.md")
    return ModelCard.from_template(metadata, template_path=str(template), **_escaped(values))


def _metadata(description: ClassifierDescription, name: str) -> ModelCardData:
    sources = dict.fromkeys(task["dataset"] for task in description.tasks if task["dataset"])
    return ModelCardData(
        base_model=hub_id(description.base_model),
        library_name="peft",
        pipeline_tag="zero-shot-image-classification",
        tags=["mmap_peft", "clip", "multi-task", *(["prompt-tuning"] if description.prompted else [])],
        datasets=[source for source in sources if "/" in source and hub_id(source)] or None,
        model_name=name,
        eval_results=_eval_results(description) or None,
    )


def _eval_results(description: ClassifierDescription) -> list[EvalResult]:
    """Accuracies of the tasks that have one, and their mean if all have."""
    tasks, accuracy = description.tasks, description.training["prompted"]
    rows = [
        (task["dataset"], _one_line(task["name"]), "accuracy", accuracy[task["name"]])
        for task in tasks
        if task["name"] in accuracy
    ]
    if len(rows) == len(tasks):
        sources = {task["dataset"] for task in tasks}
        source = sources.pop() if len(sources) == 1 else None
        rows.append((source, "mean of the tasks", "mean accuracy", _mean(tasks, accuracy)))
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=_one_line(source or "unknown"),
            dataset_name=f"{_one_line(source)}, {part}" if source else part,
            dataset_config=part,
            metric_type="accuracy",
            metric_name=metric,
            metric_value=value,
        )
        for source, part, metric, value in rows
    ]


def _mean(tasks: list[dict[str, Any]], accuracy: dict[str, float]) -> float | None:
    """Mean over all tasks, or `None` if the accuracy of one is unknown."""
    values = [accuracy.get(task["name"]) for task in tasks]
    return None if None in values else sum(values) / len(values)


def _task_table(description: ClassifierDescription) -> dict[str, Any]:
    tasks, training = description.tasks, description.training
    trained = "with prompts" if description.prompted else "trained"
    names = {task["name"] for task in tasks}
    columns = {"zero-shot": training["zero_shot"], trained: training["prompted"]}
    columns = {head: accuracy for head, accuracy in columns.items() if names & set(accuracy)}
    rows = [
        [task["name"], len(task["class_names"]), " + ".join(task["route"])]
        + [_percent(accuracy.get(task["name"])) for accuracy in columns.values()]
        for task in tasks
    ]
    if columns:
        rows.append(["mean", "", "", *(_percent(_mean(tasks, accuracy)) for accuracy in columns.values())])
    sources = dict.fromkeys(_one_line(task["dataset"]) for task in tasks if task["dataset"])
    links = [_link(hub_id(source) if "/" in source else None, source, "datasets/") for source in sources]
    return {"accuracy_heads": list(columns), "task_rows": rows, "sources": links}


def _class_lists(tasks: list[dict[str, Any]]) -> list[tuple]:
    """Names of the tasks with the same classes and templates, with these classes and templates."""
    names: dict[tuple, list[str]] = {}
    for task in tasks:
        templates = (task["template"],) if isinstance(task["template"], str) else tuple(task["template"])
        names.setdefault((tuple(task["class_names"]), templates), []).append(task["name"])
    return [(tasks_alike, *classes_and_templates) for classes_and_templates, tasks_alike in names.items()]


def _settings(config: PeftConfig) -> list[tuple[str, str]]:
    """A method's own settings, without PEFT's and without what is not set or is switched off."""
    names = {setting.name for setting in fields(config)} - {setting.name for setting in fields(PeftConfig)}
    values = {name: getattr(config, name) for name in sorted(names)}
    unset = (None, False, ENCODER_LAYERS, [], {}, "", "none")
    return [(name, str(value)) for name, value in values.items() if value not in unset and not is_dataclass(value)]


def _link(repo_id: str | None, text: str, kind: str = "") -> str:
    escaped = MarkdownText(text).__html__()
    return Markup(f"[{escaped}](https://huggingface.co/{kind}{repo_id})" if repo_id else escaped)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _literal(text: str) -> Markup:
    return Markup(json.dumps(text, ensure_ascii=False))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escaped(value: Any) -> Any:
    """A template's values with all text that is not marked as Markdown already escaped where it is written."""
    if isinstance(value, str):
        return value if isinstance(value, Markup) else MarkdownText(value)
    if isinstance(value, dict):
        return {_escaped(key): _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, (list, tuple)) else value

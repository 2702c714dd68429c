"""The README of a saved classifier: `model_card_template.md` and the values that it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markupsafe import Markup
from peft import PeftConfig

from ..methods.pooled import keeps_images
from ..prompts.base import PromptConfig
from ..registration import known_methods
from .markdown import escaped, link, literal, one_line, settings
from .repository import hub_id, shown_base


def model_card(
    description: dict[str, Any], config: PeftConfig, repo_id: str | None = None, subfolder: str | None = None
) -> ModelCard:
    """A card that says what the adapters are for, how good they are, how they were trained, and how to load them.

    Args:
        description (`dict`): the content of `tasks.json`; and `base_class`, the name of the base's class, which is
            shown if the base has no name, `adapter_parameters` and `base_parameters`, the numbers of parameters of all
            adapters together and of the base, `has_heat_map`, `grouping_remarks`, sentences about the groups, and
            `chosen_settings` of each adapter, by its name, in place of those of the config.
        config (`PeftConfig`): the method and its settings.
        repo_id, subfolder (`str`, *optional*): where the classifier will be, for the code example that loads it.
    """
    tasks, training, base_model = (description[name] for name in ("tasks", "training", "base_model"))
    base_id, prompted = hub_id(base_model), isinstance(config, PromptConfig)
    known_method = known_methods().get(config.peft_type)
    name = type(config).__name__.removesuffix("Config")
    method = f"{name} prompts" if prompted else known_method.name if known_method else name
    base = shown_base(base_model) or description["base_class"]
    title = f"{method} of {len(tasks)} tasks for {base}"
    sources = dict.fromkeys(task["dataset"] for task in tasks if task["dataset"])
    accuracies = {"zero-shot": training["zero_shot"], "with prompts" if prompted else "trained": training["prompted"]}
    metadata = _metadata(description, prompted, repo_id.split("/")[-1] if repo_id else title)
    values = {
        **description,
        "accuracies": _of_tasks(accuracies, [task["name"] for task in tasks]),
        "sources": [link(_dataset_id(source), source, "datasets/") for source in sources],
        "title": title,
        "method": method,
        "base": link(base_id, base),
        "base_is_local": base_id is None,
        "prompted": prompted,
        "settings": settings(config, _joined(description["chosen_settings"])),
        "keeps_images": keeps_images(config),
        "is_mmap": config.peft_type == "MMAP",
        "source": known_method and known_method.source,
        "class_lists": _class_lists(tasks),
        "repo_id": literal(repo_id or "your-name/your-repository"),
        "subfolder": subfolder and literal(subfolder),
        "example_task": literal(tasks[0]["name"]),
        "command": training["command"] and Markup(one_line(training["command"])),
    }
    template = Path(__file__).with_name("model_card_template.md")
    return ModelCard.from_template(metadata, template_path=str(template), **escaped(values))


def _metadata(description: dict[str, Any], prompted: bool, name: str) -> ModelCardData:
    tasks, accuracy = description["tasks"], description["training"]["prompted"]
    measured = [
        (task["dataset"], one_line(task["name"]), "accuracy", accuracy[task["name"]])
        for task in tasks
        if task["name"] in accuracy
    ]
    sources = list(dict.fromkeys(task["dataset"] for task in tasks))
    if len(measured) == len(tasks):
        mean = sum(value for *_, value in measured) / len(tasks)
        measured.append((sources[0] if len(sources) == 1 else None, "mean of the tasks", "mean accuracy", mean))
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=one_line(source or "unknown"),
            dataset_name=f"{one_line(source)}, {part}" if source else part,
            dataset_config=part,
            metric_type="accuracy",
            metric_name=metric,
            metric_value=value,
        )
        for source, part, metric, value in measured
    ]
    return ModelCardData(
        base_model=(base := hub_id(description["base_model"])),
        base_model_relation="adapter" if base else None,
        library_name="mmap_peft",
        license=description["training"]["license"],
        pipeline_tag="zero-shot-image-classification",
        tags=["peft", "clip", "multi-task", *(["prompt-tuning"] if prompted else [])],
        datasets=list(filter(_dataset_id, sources)) or None,
        model_name=name,
        eval_results=results or None,
    )


def _of_tasks(accuracies: dict[str, dict[str, float]], names: list[str]) -> dict[str, dict[str, float]]:
    """The accuracies of these tasks only, without columns that are empty then."""
    columns = {
        head: {name: by_name[name] for name in names if name in by_name} for head, by_name in accuracies.items()
    }
    return {head: by_name for head, by_name in columns.items() if by_name}


def _class_lists(tasks: list[dict[str, Any]]) -> list[tuple]:
    """Tasks grouped by classes and templates: (names of the tasks, classes, templates, classes for training)."""
    names: dict[tuple, list[str]] = {}
    for task in tasks:
        templates = (task["template"],) if isinstance(task["template"], str) else tuple(task["template"])
        key = tuple(task["class_names"]), templates, tuple(task["classes_for_training"] or ())
        names.setdefault(key, []).append(task["name"])
    return [(alike, *classes_and_templates) for classes_and_templates, alike in names.items()]


def _joined(settings: dict[str, dict[str, float]]) -> dict[str, str]:
    """Settings of adapters, by their names, as one text for each setting: those that differ with their adapters."""
    found: dict[str, dict[float, list[str]]] = {}
    for adapter, chosen in settings.items():
        for name, value in chosen.items():
            found.setdefault(name, {}).setdefault(value, []).append(adapter)
    return {
        name: ", ".join(
            str(value) if len(adapters) == 1 else f"{value} ({', '.join(of)})" for value, of in adapters.items()
        )
        for name, adapters in found.items()
    }


def _dataset_id(source: str | None) -> str | None:
    return hub_id(source) if source and "/" in source else None

"""The README of a saved classifier."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig

from ..registration import known_methods
from ..tuner.model import ENCODER_LAYERS
from .repository import hub_id


if TYPE_CHECKING:
    from ..multitask.classifier import MultiTaskClassifier


CITATION = """\
@inproceedings{xin2024mmap,
  title = {MmAP : Multi-Modal Alignment Prompt for Cross-Domain Multi-Task Learning},
  author = {Xin, Yi and Du, Junlong and Wang, Qiang and Yan, Ke and Ding, Shouhong},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume = {38},
  pages = {16076--16084},
  year = {2024}
}"""


def model_card(classifier: MultiTaskClassifier, repo_id: str | None = None, subfolder: str | None = None) -> ModelCard:
    """A card that says what the adapters are for, how good they are, how they were trained, and how to load them.

    All of it comes from the classifier, so that one that was loaded gives the same card again.

    Args:
        classifier (`MultiTaskClassifier`): the classifier.
        repo_id, subfolder (`str`, *optional*): where the card will stand, for the lines that load it.
    """
    config, base = classifier.adapter_config, _base_name(classifier)
    method, known = type(config).__name__.removesuffix("Config"), known_methods().get(config.peft_type)
    method = f"{method} prompts" if classifier.uses_prompts else known.name if known else method
    title = f"{method} of {len(classifier.tasks)} tasks for {base}"
    parts = [
        f"---\n{_metadata(classifier, repo_id.split('/')[-1] if repo_id else title).to_yaml()}\n---",
        f"# {_escape(title)}",
        f"A frozen {_link(hub_id(classifier.clip.name_or_path), base)} classifies the images of "
        f"{len(classifier.tasks)} tasks, each with the adapters that the table names. Method: {_escape(method)}. "
        f"{_size(classifier)}",
        "## Tasks",
        _task_table(classifier),
        *_classes(classifier),
        *_groups(classifier),
        "## Use",
        _usage(classifier, repo_id or "your-name/your-repository", subfolder),
        *_settings(classifier),
        *_training(classifier),
        *_citation(classifier),
    ]
    return ModelCard("\n\n".join(parts))


# ---- metadata


def _metadata(classifier: MultiTaskClassifier, name: str) -> ModelCardData:
    sources = dict.fromkeys(task.dataset for task in classifier.tasks.values() if task.dataset)
    ids = [source for source in sources if "/" in source and hub_id(source)]
    return ModelCardData(
        base_model=hub_id(classifier.clip.name_or_path),
        library_name="peft",
        pipeline_tag="zero-shot-image-classification",
        tags=["mmap_peft", "clip", "multi-task", *(["prompt-tuning"] if classifier.uses_prompts else [])],
        datasets=ids or None,
        model_name=name,
        eval_results=_results(classifier) or None,
    )


def _results(classifier: MultiTaskClassifier) -> list[EvalResult]:
    def result(source: str | None, part: str, metric: str, value: float) -> EvalResult:
        return EvalResult(
            task_type="image-classification",
            dataset_type=_plain(source or "unknown"),
            dataset_name=f"{_plain(source)}, {part}" if source else part,
            dataset_config=part,
            metric_type="accuracy",
            metric_name=metric,
            metric_value=value,
        )

    tasks, found = classifier.tasks, classifier.record.prompted
    each = [result(tasks[name].dataset, _plain(name), "accuracy", found[name]) for name in tasks if name in found]
    mean = _mean(classifier, found)
    if mean is None:
        return each
    sources = {task.dataset for task in tasks.values()}
    return [*each, result(sources.pop() if len(sources) == 1 else None, "mean of the tasks", "mean accuracy", mean)]


def _mean(classifier: MultiTaskClassifier, accuracy: dict[str, float]) -> float | None:
    """Mean over all tasks, or `None` if one is unknown."""
    if not set(classifier.tasks) <= set(accuracy):
        return None
    return sum(accuracy[name] for name in classifier.tasks) / len(classifier.tasks)


# ---- sections


def _size(classifier: MultiTaskClassifier) -> str:
    states = [classifier.adapter_state(name) for name in classifier.adapters]
    count = sum(tensor.numel() for state in states for tensor in state.values())
    base = classifier.base_size
    adapters = "One adapter holds" if len(states) == 1 else f"The {len(states)} adapters hold"
    return f"{adapters} {count:,} trained parameters, {100 * count / base:.3g} % of the base."


def _task_table(classifier: MultiTaskClassifier) -> str:
    record = classifier.record
    trained = "with prompts" if classifier.uses_prompts else "trained"
    columns = [(head, found) for head, found in (("zero-shot", record.zero_shot), (trained, record.prompted))]
    columns = [(head, found) for head, found in columns if set(found) & set(classifier.tasks)]
    rows = [
        [name, len(task.class_names), " + ".join(classifier.routes[name])]
        + [_percent(found.get(name)) for _, found in columns]
        for name, task in classifier.tasks.items()
    ]
    if columns:
        rows.append(["mean", "", ""] + [_percent(_mean(classifier, found)) for _, found in columns])
    table = _table(("task", "classes", "adapters", *(head for head, _ in columns)), rows, len(columns))
    sources = dict.fromkeys(_plain(task.dataset) for task in classifier.tasks.values() if task.dataset)
    links = ", ".join(_link(hub_id(source) if "/" in source else None, source, "datasets/") for source in sources)
    if columns:
        return f"{table}\n\nAccuracy on the evaluation images{f' of {links}' if links else ''}."
    return f"{table}\n\nImages: {links}." if links else table


def _classes(classifier: MultiTaskClassifier) -> list[str]:
    by_classes: dict[tuple, list[str]] = {}
    for name, task in classifier.tasks.items():
        template = (task.template,) if isinstance(task.template, str) else tuple(task.template)
        by_classes.setdefault((tuple(task.class_names), template), []).append(name)
    return [
        f"Classes of {_escape(', '.join(names))}: {_escape(', '.join(classes))}. "
        f"Text of a class: {', '.join(f'“{_escape(text)}”' for text in templates)}"
        for (classes, templates), names in by_classes.items()
    ]


def _groups(classifier: MultiTaskClassifier) -> list[str]:
    grouping = classifier.grouping
    if grouping is None:
        return []
    rows = [(f"group_{number}", ", ".join(members)) for number, members in enumerate(grouping.groups)]
    parts = ["## Groups", _table(("adapter", "tasks that share its prompts"), rows)]
    if grouping.similarity is not None:
        parts.append("![Cosines of the tasks' gradients, and the tree of their groups](grouping.png)")
    return parts


def _usage(classifier: MultiTaskClassifier, repo_id: str, subfolder: str | None) -> str:
    inside = f", subfolder={_literal(subfolder)}" if subfolder else ""
    base = "" if hub_id(classifier.clip.name_or_path) else ", model=base"
    task = _literal(next(iter(classifier.tasks)))
    lines = ["from PIL import Image", "from mmap_peft import MultiTaskClassifier", ""]
    if base:
        lines[1:1] = ["from transformers import CLIPModel"]
        lines.append('base = CLIPModel.from_pretrained("path/to/the/base")  # it has no name on the Hub')
    lines += [
        f"classifier = MultiTaskClassifier.from_pretrained({_literal(repo_id)}{inside}{base})",
        f'prediction = classifier.predict(Image.open("path/to/an/image.jpg"), task={task})',
        "print(prediction.labels, prediction.probabilities)",
    ]
    return "\n".join(["```python", *lines, "```"])


def _settings(classifier: MultiTaskClassifier) -> list[str]:
    """A method's own settings, without PEFT's and without what was not set or is switched off."""
    config = classifier.adapter_config
    own = {known.name for known in fields(config)} - {known.name for known in fields(PeftConfig)}
    values = {name: getattr(config, name) for name in sorted(own)}
    unset = (None, False, ENCODER_LAYERS, [], {}, "", "none")
    rows = [(name, value) for name, value in values.items() if value not in unset and not is_dataclass(value)]
    head = "## Prompts" if classifier.uses_prompts else "## Settings"
    return [head, _table(("setting", "value"), rows)] if rows else []


def _citation(classifier: MultiTaskClassifier) -> list[str]:
    known = known_methods().get(classifier.adapter_config.peft_type)
    if classifier.adapter_config.peft_type == "MMAP":
        return ["## Citation", f"```bibtex\n{CITATION}\n```\n"]
    return ["## Source", f"{_escape(known.source)}.\n"] if known else []


def _training(classifier: MultiTaskClassifier) -> list[str]:
    record, parts = classifier.record, []
    if record.settings:
        parts += ["## Training", "The seed, and arguments that differ from `MultiTaskTrainingArguments`' defaults:"]
        parts.append(_table(("argument", "value"), record.settings.items()))
    if record.versions:
        versions = ", ".join(f"{_escape(name)} {_escape(found)}" for name, found in record.versions.items())
        parts.append(f"Versions: {versions}.")
    return parts


# ---- text


def _base_name(classifier: MultiTaskClassifier) -> str:
    """The base's name; of a path the last folder, since the others are the machine's."""
    name = classifier.clip.name_or_path
    return hub_id(name) or PurePath(name or "").name or type(classifier.clip).__name__


def _link(repo_id: str | None, text: str, kind: str = "") -> str:
    return f"[{_escape(text)}](https://huggingface.co/{kind}{repo_id})" if repo_id else _escape(text)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _plain(text: Any) -> str:
    """On one line."""
    return " ".join(str(text).split())


def _escape(text: Any) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*\[\]<>~|&$]|\b_|_\b)", r"\\\1", _plain(text))


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int = 0) -> str:
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers  # the last columns are numbers
    lines = [head, rule, *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

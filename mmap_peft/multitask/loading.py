"""Reads a classifier's folder, from disk or from the Hub.

A `classifier` is a `MultiTaskClassifier`, which cannot be imported here, since it imports this file.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, ProcessorMixin

from ..hub import repository
from ..keywords import check_keywords
from .grouping import TaskGrouping
from .record import TrainingRecord
from .saving import TASK_FIELDS, TASKS_FILE, WEIGHTS_FILE
from .task import Task


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        description = json.loads((folder / TASKS_FILE).read_text())
        adapters, tasks = description["adapters"], description["tasks"]
        routes_fit = all(set(task["route"]) <= set(adapters) for task in tasks)
        description["training"] = TrainingRecord.from_dict(description.get("training", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no readable {TASKS_FILE} ({error}); give a folder that save_pretrained wrote."
        ) from error
    # The names become paths, and the file may come from anybody.
    if not adapters or not routes_fit or not all(re.fullmatch(r"\w+", adapter) for adapter in adapters):
        raise ValueError(f"{folder / TASKS_FILE} names adapters {adapters}, which are no names of adapter folders.")
    return description


def load(classifier: Any, folder: Path) -> None:
    """Take routes, grouping and weights from a folder, or raise a `ValueError` and change nothing."""
    description = _read_description(folder)
    adapters, grouping = description["adapters"], description["grouping"]
    routes = {task["name"]: tuple(task["route"]) for task in description["tasks"]}
    if list(routes) != list(classifier.tasks):
        raise ValueError(f"{folder} is of the tasks {list(routes)}, but the classifier has {list(classifier.tasks)}.")
    if not classifier.uses_prompts and adapters != classifier.adapters:
        raise ValueError(f"{folder} holds the adapters {adapters}, but the classifier has {classifier.adapters}.")
    weights = {adapter: _read_weights(classifier, folder, adapter) for adapter in adapters}
    if classifier.adapters != adapters:
        classifier.replace_adapters(adapters)
    for adapter, tensors in weights.items():
        classifier.load_adapter_state(adapter, tensors)
    classifier.routes, classifier.record = routes, description["training"]
    classifier.grouping = None if grouping is None else TaskGrouping(**grouping)


def _read_weights(classifier: Any, folder: Path, adapter: str) -> dict[str, torch.Tensor]:
    path = folder / adapter / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises several kinds of its own exceptions for damaged files
        raise ValueError(f"{path} is missing or damaged ({error}); nothing was loaded from {folder}.") from error
    expected = classifier.adapter_state(adapter if adapter in classifier.adapters else classifier.adapters[0])
    shapes, needed = (
        {name: list(tensor.shape) for name, tensor in sorted(state.items())} for state in (tensors, expected)
    )
    if shapes != needed:
        raise ValueError(
            f"{path} holds {shapes}, but the classifier's settings and base need {needed}; nothing was loaded."
        )
    return tensors


@check_keywords(ProcessorMixin.from_pretrained)
def load_processor(name_or_path: str | os.PathLike, subfolder: str = "", **options: Any) -> Any:
    """A CLIP's processor with images prepared by PIL, so that pixels are the same on every machine.

    Args:
        name_or_path (`str`): the CLIP's name on the Hub, or its folder.
        subfolder (`str`): a folder inside `name_or_path`.
        options: as for `AutoProcessor.from_pretrained`: `revision`, `token`, `cache_dir`, `local_files_only` and
            `force_download`. An unknown keyword raises a `TypeError`.
    """
    return AutoProcessor.from_pretrained(name_or_path, backend="pil", subfolder=subfolder, **options)


def from_pretrained(
    cls: type, source: Any, model: Any, processor: Any, subfolder: str | None, text_chunk: int | None, **download: Any
) -> Any:
    """As documented for `MultiTaskClassifier.from_pretrained`."""
    inside = repository.check_subfolder(subfolder)
    if not os.path.isdir(source):
        files = (TASKS_FILE, "*/adapter_config.json", f"*/{WEIGHTS_FILE}")
        patterns = [(Path(inside) / file).as_posix() for file in files]
        with repository.hub_errors(str(source), download.get("revision")):
            source = snapshot_download(str(source), allow_patterns=patterns, **download)
    folder = Path(source) / inside
    shared = {name: download[name] for name in ("token", "cache_dir", "local_files_only") if name in download}
    description = _read_description(folder)
    tasks = [Task(**{field: task[field] for field in TASK_FIELDS if field in task}) for task in description["tasks"]]
    config = PeftConfig.from_pretrained(str(folder / description["adapters"][0]))
    if model is None:
        base = description["base_model"]
        if not base or (os.path.isabs(base) and not os.path.isdir(base)):
            raise ValueError(
                f"{folder} was trained on the base {base or 'of a folder'}, which is neither here nor on the Hub; "
                "load that base and write from_pretrained(..., model=base)."
            )
        model = AutoModel.from_pretrained(base, **shared)
    if processor is None:
        processor = load_processor(model.name_or_path, **shared)
    config.inference_mode = False
    classifier = cls(model, processor, tasks, config, text_chunk=text_chunk)
    load(classifier, folder)
    return classifier.eval()

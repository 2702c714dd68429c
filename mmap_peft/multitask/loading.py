"""Reads a classifier's folder, from disk or from the Hub.

A `classifier` is a `MultiTaskClassifier`, which cannot be imported here, since it imports this file.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoProcessor, ProcessorMixin

from ..hub import repository
from ..keywords import check_keywords
from .base_record import BaseRecord
from .grouping import TaskGrouping
from .record import TrainingRecord
from .replacing import DIGESTS, PREFIX, find, sha256
from .saving import DIGEST, TASK_FIELDS, TASKS_FILE, WEIGHTS_FILE, content_digest
from .task import Task


logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WITHOUT_CHECK = "if it was changed on purpose, write verify=False"


@dataclass
class Contents:
    """What a folder holds, all of it read and checked by itself."""

    description: dict[str, Any]
    config: PeftConfig
    weights: dict[str, dict[str, torch.Tensor]]

    @classmethod
    def of(cls, folder: Path, verify: bool) -> Contents:
        """Read a folder, again if another process saves into it meanwhile."""
        while True:
            before = _state(folder)
            try:
                contents = cls._read(folder, verify)
            except ValueError:
                if _state(folder) == before:
                    raise
            else:
                if _state(folder) == before:
                    return contents

    @classmethod
    def _read(cls, folder: Path, verify: bool) -> Contents:
        description = _read_description(folder, verify)
        names = [f"{adapter}/{file}" for adapter in description["adapters"] for file in (CONFIG_FILE, WEIGHTS_FILE)]
        digests = description.get(DIGESTS, {})
        paths = {name: find(folder, name, digests.get(name)) for name in names}
        for name, path in paths.items():
            if verify and name in digests and (not path.is_file() or sha256(path) != digests[name]):
                reason = "damaged, or of another saving" if path.is_file() else "missing"
                raise ValueError(f"{path} is {reason}; nothing was loaded. Restore it, or {WITHOUT_CHECK}.")
        config = PeftConfig.from_pretrained(str(paths[names[0]].parent))
        weights = {adapter: _read_weights(paths[f"{adapter}/{WEIGHTS_FILE}"]) for adapter in description["adapters"]}
        return cls(description, config, weights)


def _state(folder: Path) -> list[tuple[str, int]]:
    """What changes in a folder when another process saves into it."""
    try:
        return sorted(
            (entry.name, entry.inode())
            for entry in os.scandir(folder)
            if entry.name == TASKS_FILE or entry.name.startswith(PREFIX)
        )
    except OSError:  # what reads the files says so
        return []


def _read_description(folder: Path, verify: bool) -> dict[str, Any]:
    try:
        description = json.loads((folder / TASKS_FILE).read_text())
        adapters, tasks = description["adapters"], description["tasks"]
        unchanged = description.get(DIGEST) in (None, content_digest(description))
        routes_fit = all(set(task["route"]) <= set(adapters) for task in tasks)
        description["base"] = BaseRecord.from_dict(description.get("base"))
        description["training"] = TrainingRecord.from_dict(description.get("training", {}))
        grouping = description["grouping"]
        description["grouping"] = None if grouping is None else TaskGrouping(**grouping)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no readable {TASKS_FILE} ({error}); give a folder that save_pretrained wrote."
        ) from error
    # The names become paths, and the file may come from anybody.
    if not adapters or not routes_fit or not all(re.fullmatch(r"\w+", adapter) for adapter in adapters):
        raise ValueError(f"{folder / TASKS_FILE} names adapters {adapters}, which are no names of adapter folders.")
    if verify and not unchanged:
        raise ValueError(
            f"{folder / TASKS_FILE} is damaged or was changed after it was saved; restore it, or {WITHOUT_CHECK}."
        )
    return description


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises several kinds of its own exceptions for damaged files
        raise ValueError(f"{path} is missing or damaged ({error}); nothing was loaded.") from error


def load(classifier: Any, folder: Path, verify: bool = True) -> None:
    """Take routes, grouping and weights from a folder, or raise a `ValueError` and change nothing."""
    contents = Contents.of(folder, verify)
    _take(classifier, contents, folder)
    _report(contents.description["base"].differences(classifier))


def _take(classifier: Any, contents: Contents, folder: Path) -> None:
    """Take over what a folder holds. What can fail comes first."""
    description, weights = contents.description, contents.weights
    adapters, routes = description["adapters"], {task["name"]: tuple(task["route"]) for task in description["tasks"]}
    if list(routes) != list(classifier.tasks):
        raise ValueError(f"{folder} is of the tasks {list(routes)}, but the classifier has {list(classifier.tasks)}.")
    if not classifier.uses_prompts and adapters != classifier.adapters:
        raise ValueError(f"{folder} holds the adapters {adapters}, but the classifier has {classifier.adapters}.")
    for adapter, tensors in weights.items():
        _check_shapes(classifier, adapter, tensors, folder)
    if classifier.adapters != adapters:
        classifier.replace_adapters(adapters)
    for adapter, tensors in weights.items():
        classifier.load_adapter_state(adapter, tensors)
    classifier.routes, classifier.record = routes, description["training"]
    classifier.grouping = description["grouping"]


def _check_shapes(classifier: Any, adapter: str, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    expected = classifier.adapter_state(adapter if adapter in classifier.adapters else classifier.adapters[0])
    shapes, needed = (
        {name: list(tensor.shape) for name, tensor in sorted(state.items())} for state in (tensors, expected)
    )
    if shapes != needed:
        raise ValueError(
            f"{folder / adapter / WEIGHTS_FILE} holds {shapes}, but the classifier's settings and base need {needed}; "
            "nothing was loaded."
        )


def _report(differences: Iterable[tuple[str, str]], refused: Collection[str] = ()) -> None:
    for part, sentence in differences:
        if part in refused:
            raise ValueError(
                f"{sentence} Load the {part} of the training and write from_pretrained(..., {part}=...), or write "
                "verify=False."
            )
        logger.warning("%s Predictions are not those of the training.", sentence)


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
    cls: type,
    source: Any,
    model: Any,
    processor: Any,
    subfolder: str | None,
    text_chunk: int | None,
    verify: bool,
    **download: Any,
) -> Any:
    """As documented for `MultiTaskClassifier.from_pretrained`."""
    folder = _download(source, subfolder, **download)
    shared = {name: download[name] for name in ("token", "cache_dir", "local_files_only") if name in download}
    contents = Contents.of(folder, verify)
    description, config = contents.description, contents.config
    base, name = description["base"], description["base_model"]
    tasks = [Task(**{field: task[field] for field in TASK_FIELDS if field in task}) for task in description["tasks"]]
    found = [part for part, given in (("model", model), ("processor", processor)) if verify and given is None]
    if model is None:
        if not name or (os.path.isabs(name) and not os.path.isdir(name)):
            raise ValueError(
                f"{folder} was trained on the base {name or 'of a folder'}, which is neither here nor on the Hub; "
                "load that base and write from_pretrained(..., model=base)."
            )
        model = base.load_model(name, **shared)
    if processor is None:
        place = base.place if model.name_or_path == name else {}
        processor = load_processor(model.name_or_path, **place, **shared)
        base.restore_image_processor(processor)
    # Digests are compared below; PEFT would warn of a model that only has another name.
    config.inference_mode, config.base_model_name_or_path = False, model.name_or_path or None
    classifier = cls(model, processor, tasks, config, text_chunk=text_chunk)
    _take(classifier, contents, folder)
    _report(base.differences(classifier), found)
    return classifier.eval()


def _download(source: Any, subfolder: str | None, **download: Any) -> Path:
    """A classifier's folder, which is downloaded if `source` is no folder."""
    inside = repository.check_subfolder(subfolder)
    if not os.path.isdir(source):
        files = (TASKS_FILE, f"*/{CONFIG_FILE}", f"*/{WEIGHTS_FILE}")
        patterns = [(Path(inside) / file).as_posix() for file in files]
        with repository.hub_errors(str(source), download.get("revision")):
            source = snapshot_download(str(source), allow_patterns=patterns, **download)
    return Path(source) / inside

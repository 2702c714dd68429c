"""A classifier's folder, on disk and on the Hub: `tasks.json`, a model card, and a PEFT adapter a folder."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo, HfApi
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from ..hub import repository
from ..hub.model_card import model_card
from .grouping import TaskGrouping
from .plots import plot_grouping
from .record import TrainingRecord
from .task import Task


if TYPE_CHECKING:
    from .classifier import MultiTaskClassifier


TASKS_FILE = "tasks.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEAT_MAP_FILE = "grouping.png"


def save(classifier: MultiTaskClassifier, folder: Path, public: bool = False) -> None:
    """Write a classifier to a folder; other files that are there stay. If public, no path of this machine is in it."""
    if not classifier.adapters:
        raise ValueError("A zero-shot classifier has no adapter to save; give the MultiTaskClassifier a config.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        beside = Path(name)
        if isinstance(classifier.model, PeftModel):
            classifier.model.save_pretrained(beside, save_embedding_layers=False)
        else:
            _save_probes(classifier, beside)
        grouping = classifier.grouping
        if grouping is not None and grouping.similarity is not None:
            plot_grouping(grouping, beside / HEAT_MAP_FILE)
        description = _describe(classifier)
        if public:
            description["base_model"] = repository.hub_id(description["base_model"])
            for path in beside.glob(f"*/{CONFIG_FILE}"):
                config = {**json.loads(path.read_text()), "base_model_name_or_path": description["base_model"]}
                path.write_text(json.dumps(config, indent=2, sort_keys=True))
        (beside / TASKS_FILE).write_text(json.dumps(description, indent=1))
        model_card(classifier).save(beside / "README.md")
        # Each file is whole at any time; tasks.json names the others, so it comes last.
        files = sorted(
            (path for path in beside.rglob("*") if path.is_file()), key=lambda path: path.name == TASKS_FILE
        )
        for path in files:
            target = folder / path.relative_to(beside)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)


def _save_probes(classifier: MultiTaskClassifier, folder: Path) -> None:
    """Write the probes in the files that PEFT would have written."""
    config = copy.deepcopy(classifier.adapter_config)
    config.base_model_name_or_path = classifier.clip.name_or_path
    for adapter in classifier.adapters:
        config.save_pretrained(folder / adapter)
        save_file(classifier.adapter_state(adapter), folder / adapter / WEIGHTS_FILE, metadata={"format": "pt"})


def _describe(classifier: MultiTaskClassifier) -> dict[str, Any]:
    return {
        "base_model": classifier.clip.name_or_path,
        "adapters": classifier.adapters,
        "tasks": [
            {
                "name": task.name,
                "class_names": task.class_names,
                "template": task.template,
                "class_texts": task.class_texts,
                "route": classifier.routes[task.name],
                "dataset": task.dataset,
            }
            for task in classifier.tasks.values()
        ],
        "training": classifier.record.to_dict(),
        "grouping": None if classifier.grouping is None else classifier.grouping.to_dict(),
    }


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        description = json.loads((folder / TASKS_FILE).read_text())
        adapters, tasks = description["adapters"], description["tasks"]
        known = all(set(task["route"]) <= set(adapters) for task in tasks)
        description["training"] = TrainingRecord.from_dict(description.get("training", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no readable {TASKS_FILE} ({error}); give a folder that "
            "MultiTaskClassifier.save_pretrained wrote."
        ) from error
    # The names become paths, and the file may come from anybody.
    if not adapters or not known or not all(re.fullmatch(r"\w+", adapter) for adapter in adapters):
        raise ValueError(f"{folder / TASKS_FILE} names adapters {adapters}, which are no names of adapter folders.")
    return description


def _read_weights(folder: Path, adapters: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    weights = {}
    for adapter in adapters:
        path = folder / adapter / WEIGHTS_FILE
        try:
            weights[adapter] = load_file(path)
        except Exception as error:  # safetensors has exceptions of its own for each way of being damaged
            raise ValueError(f"{path} is missing or damaged ({error}); nothing was loaded from {folder}.") from error
    return weights


def load(classifier: MultiTaskClassifier, folder: Path) -> None:
    """Take routes, grouping and weights from a folder, or raise a `ValueError` and change nothing."""
    description = _read_description(folder)
    routes = {task["name"]: tuple(task["route"]) for task in description["tasks"]}
    if list(routes) != list(classifier.tasks):
        raise ValueError(f"{folder} is of the tasks {list(routes)}, but the classifier has {list(classifier.tasks)}.")
    adapters = description["adapters"]
    weights = _read_weights(folder, adapters)
    if not classifier.prompted and adapters != classifier.adapters:
        raise ValueError(f"{folder} holds the adapters {adapters}, but the classifier has {classifier.adapters}.")
    for adapter, tensors in weights.items():
        like = adapter if adapter in classifier.adapters else classifier.adapters[0]
        expected = _shapes(classifier.adapter_state(like))
        if _shapes(tensors) != expected:
            raise ValueError(
                f"{folder / adapter / WEIGHTS_FILE} holds {_shapes(tensors)}, but the classifier's settings and base "
                f"need {expected}; nothing was loaded."
            )
    if classifier.adapters != adapters:
        classifier.fresh_adapters(adapters)
    for adapter, tensors in weights.items():
        classifier.load_adapter_state(adapter, tensors)
    classifier.routes = routes
    grouping = description["grouping"]
    classifier.grouping = None if grouping is None else TaskGrouping.from_dict(grouping)
    classifier.record = description["training"]


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}


def restore(
    cls: type[MultiTaskClassifier], folder: Path, model: Any = None, processor: Any = None, **options: Any
) -> MultiTaskClassifier:
    """Make a classifier from a folder; a base or processor that is not given is loaded by its name, with options."""
    description = _read_description(folder)
    tasks = [
        Task(
            task["name"],
            task["class_names"],
            template=task["template"],
            class_texts=task["class_texts"],
            dataset=task.get("dataset"),
        )
        for task in description["tasks"]
    ]
    config = PeftConfig.from_pretrained(str(folder / description["adapters"][0]))
    if model is None:
        base = description["base_model"]
        if not base or (os.path.isabs(base) and not os.path.isdir(base)):
            raise ValueError(
                f"{folder} was trained on the base {base or 'of a folder'}, which is neither here nor on the Hub; "
                "load that base and write from_pretrained(..., model=base)."
            )
        model = AutoModel.from_pretrained(base, **options)
    processor = load_processor(model.name_or_path, **options) if processor is None else processor
    config.inference_mode = False
    classifier = cls(model, processor, tasks, copy.deepcopy(config))
    load(classifier, folder)
    return classifier.eval()


def load_processor(name_or_path: str | os.PathLike, **options: Any) -> Any:
    """A CLIP's processor with images prepared by PIL, so that pixels are the same on every machine.

    Args:
        name_or_path: the CLIP's name on the Hub, or its folder.
        options: for `AutoProcessor.from_pretrained`: `revision`, `token`, `cache_dir` and the like.
    """
    return AutoProcessor.from_pretrained(name_or_path, backend="pil", **options)


def from_pretrained(
    cls: type[MultiTaskClassifier],
    name_or_path: str | os.PathLike,
    model: Any = None,
    processor: Any = None,
    subfolder: str | None = None,
    **download: Any,
) -> MultiTaskClassifier:
    """Make a classifier from a folder, or from one that is fetched from the Hub."""
    patterns = [TASKS_FILE, f"*/{CONFIG_FILE}", f"*/{WEIGHTS_FILE}"]
    folder = repository.fetch(name_or_path, patterns, subfolder, **download)
    shared = {name: download[name] for name in ("token", "cache_dir", "local_files_only") if name in download}
    return restore(cls, folder, model, processor, **shared)


def push(
    classifier: MultiTaskClassifier,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    parent_commit: str | None = None,
    commit_message: str = "Upload adapters",
) -> CommitInfo:
    """Upload a classifier to the Hub in one commit."""
    repository.check_subfolder(subfolder)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(classifier, folder, public=True)
        repo_id = repository.create(api, repo_id, private, revision)
        model_card(classifier, repo_id, subfolder).save(folder / "README.md")
        return repository.upload(api, repo_id, folder, revision, subfolder, parent_commit, commit_message)

"""A classifier's folder, on disk and on the Hub: `tasks.json`, a model card, and a folder for each PEFT adapter.

A `classifier` is a `MultiTaskClassifier`, which cannot be imported here, since it imports this file.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, snapshot_download
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, ProcessorMixin

from ..hub import model_card as cards
from ..hub import repository
from ..keywords import check_keywords
from .grouping import TaskGrouping
from .plots import plot_grouping
from .record import TrainingRecord
from .task import Task


TASKS_FILE = "tasks.json"
WEIGHTS_FILE = "adapter_model.safetensors"
TASK_FIELDS = ("name", "class_names", "template", "class_texts", "dataset")  # in tasks.json, besides the route


def save(classifier: Any, folder: Path, public: bool = False) -> None:
    """Write a classifier to a folder; other files in it stay. With `public`, no path of this machine is written."""
    if not classifier.adapters:
        raise ValueError("A zero-shot classifier has no adapter to save; give the MultiTaskClassifier a config.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
        new = Path(name)
        description = _describe(classifier)
        if public:
            description["base_model"] = repository.hub_id(description["base_model"])
        for adapter in classifier.adapters:
            _save_adapter(classifier, adapter, new / adapter, description["base_model"])
        if classifier.grouping is not None and classifier.grouping.similarity is not None:
            plot_grouping(classifier.grouping, new / "grouping.png")
        model_card(classifier).save(new / "README.md")
        (new / TASKS_FILE).write_text(json.dumps(description, indent=1))
        # Each file is replaced at once; tasks.json names the others, so it is moved last.
        files = [path for path in new.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == TASKS_FILE):
            target = folder / path.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)


def _save_adapter(classifier: Any, adapter: str, folder: Path, base_model: str | None) -> None:
    clip = classifier.clip
    # PEFT completes the settings where it puts an adapter into a model, for example with the modules it goes to.
    config = copy.deepcopy(getattr(clip, "peft_config", {}).get(adapter, classifier.adapter_config))
    config.base_model_name_or_path, config.inference_mode = base_model or None, True
    auto_mapping = {"base_model_class": type(clip).__name__, "parent_library": type(clip).__module__}
    config.save_pretrained(folder, auto_mapping_dict=auto_mapping)
    tensors = {name: tensor.contiguous() for name, tensor in classifier.adapter_state(adapter).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _describe(classifier: Any) -> dict[str, Any]:
    """The content of `tasks.json`."""
    return {
        "base_model": classifier.clip.name_or_path,
        "adapters": classifier.adapters,
        "tasks": [
            {**{field: getattr(task, field) for field in TASK_FIELDS}, "route": classifier.routes[task.name]}
            for task in classifier.tasks.values()
        ],
        "training": asdict(classifier.record),
        "grouping": None if classifier.grouping is None else classifier.grouping.to_dict(),
    }


def model_card(classifier: Any, repo_id: str | None = None, subfolder: str | None = None) -> ModelCard:
    """The model card of a classifier, for a folder, or for a repository and subfolder on the Hub."""
    states = [classifier.adapter_state(adapter) for adapter in classifier.adapters]
    description = {
        **_describe(classifier),
        "base_class": type(classifier.clip).__name__,
        "adapter_parameters": sum(tensor.numel() for state in states for tensor in state.values()),
        "base_parameters": classifier.base_size,
    }
    return cards.model_card(description, classifier.adapter_config, repo_id, subfolder)


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


def push(
    classifier: Any,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    parent_commit: str | None = None,
    commit_message: str = "Upload adapters",
) -> CommitInfo:
    """As documented for `MultiTaskClassifier.push_to_hub`."""
    repository.check_subfolder(subfolder)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(classifier, folder, public=True)
        with repository.hub_errors(repo_id, revision, parent_commit):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            model_card(classifier, repo_id, subfolder).save(folder / "README.md")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder or None,
                revision=revision,
                parent_commit=parent_commit,
                commit_message=commit_message,
            )

"""Writes a classifier's folder, on disk and on the Hub: `tasks.json`, a model card, a folder for each PEFT adapter.

A `classifier` is a `MultiTaskClassifier`, which cannot be imported here, since it imports this file.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from safetensors.torch import save_file

from ..hub import model_card as cards
from ..hub import repository
from .plots import plot_grouping


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

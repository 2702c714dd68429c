"""Writes a classifier's folder, on disk and on the Hub: `tasks.json`, a model card, prototypes if the classifier has
any, the matrices of the grouping, and a folder for each PEFT adapter.

A `classifier` is a `MultiTaskClassifier`, which cannot be imported here, since it imports this file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..hub import model_card as cards
from ..hub import repository
from ..hub.adapter_card import adapter_card
from ..version import __version__
from .base_record import BaseRecord
from .files import read_json
from .plots import plot_grouping
from .replacing import DIGESTS, read_digests, replace_files, sha256


TASKS_FILE = "tasks.json"
LIBRARY = "mmap_peft"  # its name on the Hub
ROOT_CONFIG = "config.json"  # what the Hub counts downloads by; nothing reads it
CARD_FILE, PICTURE_FILE = "README.md", "grouping.png"
DIGEST = "sha256"  # in tasks.json: that of all else in it
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PROTOTYPES_FILE = "prototypes.safetensors"
AFFINITY_FILE = "affinity.safetensors"  # the matrices of the grouping
# In tasks.json, besides the route.
TASK_FIELDS = ("name", "class_names", "template", "class_texts", "dataset", "classes_for_training")


def save(classifier: Any, folder: Path, public: bool = False, card: bool = True) -> None:
    """Write a classifier to a folder: all files are replaced at once, and other files in it stay.

    With `public`, no path of this machine is written. Without `card`, the model card and the heat map are left out.

    Raises:
        ValueError: a zero-shot classifier, or weights that are not finite.
        OSError: a file cannot be written. The folder holds what it held before.
    """
    if not classifier.adapters:
        raise ValueError("A zero-shot classifier has no adapter to save; give the MultiTaskClassifier a config.")
    states = {adapter: classifier.adapter_state(adapter) for adapter in classifier.adapters}
    for adapter, tensors in states.items():
        check_finite(tensors, f"Adapter {adapter!r}")
    if classifier.prototypes is not None:
        check_finite(classifier.prototypes.features, "A prototype")
    description = _describe(classifier)
    if public:
        description["base_model"] = repository.hub_id(description["base_model"])
    try:
        with replace_files(folder, TASKS_FILE) as new:
            if _is_ours(folder / ROOT_CONFIG):
                _write_root_config(description, new)
            _write(classifier, description, states, new, card)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise OSError(
            f"{folder} cannot be written ({reason}), so it holds what it held before; make space, or give another "
            "folder."
        ) from error


def _write(classifier: Any, description: dict[str, Any], states: dict[str, Any], folder: Path, card: bool) -> None:
    for adapter, tensors in states.items():
        _save_adapter(classifier, adapter, tensors, folder / adapter, description["base_model"])
    if classifier.prototypes is not None:
        save_file(classifier.prototypes.to_tensors(), folder / PROTOTYPES_FILE, metadata={"format": "pt"})
    if classifier.grouping is not None and (tensors := classifier.grouping.to_tensors()):
        save_file(tensors, folder / AFFINITY_FILE, metadata={"format": "pt"})
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    description[DIGESTS] = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    if card:
        write_card(classifier, folder)
    description[DIGEST] = content_digest(description)
    (folder / TASKS_FILE).write_text(json.dumps(description, indent=1), encoding="utf-8")


def _write_root_config(description: dict[str, Any], folder: Path) -> None:
    tasks, base = [task["name"] for task in description["tasks"]], description["base_model"]
    fields = {"library_name": LIBRARY, "library_version": __version__, "base_model": base, "tasks": tasks}
    (folder / ROOT_CONFIG).write_text(json.dumps(fields, indent=1), encoding="utf-8")


def _is_ours(path: Path) -> bool:
    """Whether there is no `config.json`, or one of this library: that of a CLIP in the same folder stays."""
    try:
        return not path.exists() or read_json(path)["library_name"] == LIBRARY
    except (ValueError, KeyError, TypeError):
        return False


def check_finite(tensors: dict[str, torch.Tensor], source: str) -> None:
    """Raise a `ValueError` that begins with `source` if one of the tensors holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{source} holds numbers that are not finite, in {name!r}; take the last checkpoint before training "
                "diverged, and lower learning_rate."
            )


def content_digest(description: dict[str, Any]) -> str:
    """The SHA-256 of what `tasks.json` says, whatever its spaces and line ends are."""
    content = {name: value for name, value in description.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_card(classifier: Any, folder: Path, repo_id: str | None = None, subfolder: str | None = None) -> list[str]:
    """Write the model card, a short one for each adapter, and the heat map of the grouping if there is one.

    Returns:
        The names of the files inside the folder.
    """
    names = [CARD_FILE, *(f"{adapter}/{CARD_FILE}" for adapter in classifier.adapters)]
    if _has_affinity(classifier):
        plot_grouping(classifier.grouping, folder / PICTURE_FILE)
        names.append(PICTURE_FILE)
    model_card(classifier, repo_id, subfolder).save(folder / CARD_FILE)
    clip, tasks = classifier.clip, len(classifier.tasks)
    for adapter in classifier.adapters:
        config, size = classifier.adapter_set.config_of(adapter), classifier.adapter_size(adapter)
        chosen = classifier.adapter_set.chosen_settings(adapter)
        place = "/".join(filter(None, [subfolder, adapter]))
        card = adapter_card(config, clip.name_or_path, type(clip).__name__, size, repo_id, [place], tasks, chosen)
        card.save(folder / adapter / CARD_FILE)
    return names


def _has_affinity(classifier: Any) -> bool:
    return classifier.grouping is not None and classifier.grouping.similarity is not None


def _save_adapter(
    classifier: Any, adapter: str, tensors: dict[str, torch.Tensor], folder: Path, base_model: str | None
) -> None:
    clip = classifier.clip
    # PEFT completes the settings where it puts an adapter into a model, for example with the modules it goes to.
    config = copy.deepcopy(classifier.adapter_set.config_of(adapter))
    config.base_model_name_or_path, config.inference_mode = base_model or None, True
    auto_mapping = {"base_model_class": type(clip).__name__, "parent_library": type(clip).__module__}
    config.save_pretrained(folder, auto_mapping_dict=auto_mapping)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _describe(classifier: Any) -> dict[str, Any]:
    """The content of `tasks.json`, without the digests."""
    return {
        "base_model": classifier.clip.name_or_path,
        "base": BaseRecord.of(classifier).to_dict(),
        "adapters": classifier.adapters,
        "tasks": [
            {**{field: getattr(task, field) for field in TASK_FIELDS}, "route": classifier.routes[task.name]}
            for task in classifier.tasks.values()
        ],
        "training": asdict(classifier.record),
        "grouping": None if classifier.grouping is None else classifier.grouping.to_dict(matrices=False),
    }


def model_card(classifier: Any, repo_id: str | None = None, subfolder: str | None = None) -> ModelCard:
    """The model card of a classifier, for a folder, or for a repository and subfolder on the Hub."""
    description = {
        **_describe(classifier),
        "base_class": type(classifier.clip).__name__,
        "adapter_parameters": sum(classifier.adapter_size(adapter) for adapter in classifier.adapters),
        "base_parameters": classifier.base_size,
        "has_heat_map": _has_affinity(classifier),
        "grouping_remarks": [] if classifier.grouping is None else classifier.grouping.remarks,
        "chosen_settings": {name: classifier.adapter_set.chosen_settings(name) for name in classifier.adapters},
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
    card_folder: Path | None = None,
) -> CommitInfo:
    """As documented for `MultiTaskClassifier.push_to_hub`. The card is written into `card_folder` as well."""
    inside = repository.check_subfolder(subfolder)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(classifier, folder, public=True, card=False)
        with repository.hub_errors(repo_id, revision, parent_commit):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            for file in write_card(classifier, card_folder or folder, repo_id, subfolder):
                if card_folder is not None:
                    shutil.copyfile(card_folder / file, folder / file)
            new = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            prefix = f"{inside}/" if inside else ""
            changes = [
                CommitOperationDelete(prefix + file) for file in _left_over(api, repo_id, revision, prefix, new)
            ]
            changes += [CommitOperationAdd(prefix + file, path) for file, path in sorted(new.items())]
            options = {"revision": revision, "parent_commit": parent_commit, "commit_message": commit_message}
            return api.create_commit(repo_id, changes, **options)  # one, which leaves out what is there already


def _left_over(api: HfApi, repo_id: str, revision: str | None, prefix: str, new: dict[str, Path]) -> list[str]:
    """Files of an earlier push that this one has no more, such as those of a group, by their names behind `prefix`.

    Takes the `config.json` out of the `new` files if there is one of a CLIP.
    """
    files = api.list_repo_files(repo_id, revision=revision)
    present = {file.removeprefix(prefix) for file in files if file.startswith(prefix)}
    here = {
        name: Path(api.hf_hub_download(repo_id, prefix + name, revision=revision))
        for name in {TASKS_FILE, ROOT_CONFIG} & present
    }
    if ROOT_CONFIG in here and not _is_ours(here[ROOT_CONFIG]):
        new.pop(ROOT_CONFIG)
    if TASKS_FILE not in here:
        return []
    written = read_digests(here[TASKS_FILE])
    cards = [f"{folder}/{CARD_FILE}" for folder in {Path(file).parent.as_posix() for file in written} - {"."}]
    return sorted({*written, *cards, PICTURE_FILE} & present - {*new, ROOT_CONFIG})

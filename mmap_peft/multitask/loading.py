"""Reads a classifier's folder, from disk or from the Hub.

A `classifier` is a `MultiTaskClassifier`, which cannot be imported here, since it imports this file.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from transformers import AutoProcessor, ProcessorMixin

from ..checking import shortened
from ..hub import repository
from ..keywords import check_keywords
from .adapters import feature_size
from .description import Description, check_shapes, check_sizes, read_config, with_matrices
from .files import read_tensors
from .prototypes import Prototypes
from .replacing import PREFIX, find, sha256
from .saving import AFFINITY_FILE, CONFIG_FILE, PROTOTYPES_FILE, ROOT_CONFIG, TASKS_FILE, WEIGHTS_FILE


logger = logging.getLogger(__name__)

WITHOUT_CHECK = "if it was changed on purpose, write verify=False"


@dataclass
class Contents:
    """What a folder holds, all of it read and checked by itself."""

    description: Description
    config: PeftConfig
    weights: dict[str, dict[str, torch.Tensor]]
    prototypes: dict[str, torch.Tensor] | None

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
        description = Description.of(folder)
        digests, configs, weights = description.digests, {}, {}
        for adapter in description.adapters:
            config, tensors = (
                _find(folder, f"{adapter}/{file}", digests, verify) for file in (CONFIG_FILE, WEIGHTS_FILE)
            )
            configs[adapter], weights[adapter] = read_config(config), read_tensors(tensors)
        first, *others = description.adapters
        for adapter in others:
            if _settings(configs[adapter]) != _settings(configs[first]):
                raise ValueError(f"{folder / adapter / CONFIG_FILE} has other settings than {first}/{CONFIG_FILE}.")
        prototypes = None
        if PROTOTYPES_FILE in digests:  # else the file, if there is one, is of an earlier saving
            prototypes = read_tensors(_find(folder, PROTOTYPES_FILE, digests, verify))
        if AFFINITY_FILE in digests:
            path = _find(folder, AFFINITY_FILE, digests, verify)
            description.grouping = with_matrices(description.grouping, read_tensors(path), path)
        return cls(description, configs[first], weights, prototypes)


def _find(folder: Path, name: str, digests: Mapping[str, str], verify: bool) -> Path:
    """The path of a file of the folder, or with `verify` a `ValueError` if it has another digest."""
    path = find(folder, name, digests.get(name))
    if verify and name in digests and (not path.is_file() or sha256(path) != digests[name]):
        reason = "damaged, or of another saving" if path.is_file() else "missing"
        raise ValueError(f"{path} is {reason}; nothing was loaded. Restore it, or {WITHOUT_CHECK}.")
    return path


def _settings(config: PeftConfig) -> dict[str, Any]:
    """The settings without those of initial values, which adapters of one classifier may differ in."""
    return {name: value for name, value in vars(config).items() if not name.startswith("init")}


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


def load(classifier: Any, folder: Path, verify: bool = True) -> None:
    """Take routes, grouping and weights from a folder, or raise a `ValueError` and change nothing."""
    contents = Contents.of(folder, verify)
    if not classifier.adapters:
        raise ValueError("A zero-shot classifier has no adapters to load; give the MultiTaskClassifier a config.")
    if verify:
        _check_settings(classifier.adapter_set.config_of(classifier.adapters[0]), contents.config, folder)
    _take(classifier, contents, folder, verify)
    _report(contents.description.base.differences(classifier))


def _check_settings(own: PeftConfig, saved: PeftConfig, folder: Path) -> None:
    """Raise a `ValueError` if settings differ that count after training and do not show in the shapes of tensors."""
    skipped = {field.name for field in fields(PeftConfig)} - {"peft_type"}
    for name, value in vars(saved).items():
        mine = getattr(own, name, None)
        if (
            name not in skipped
            and not re.search("init|dropout|modules|layers", name)
            and _plain(value) != _plain(mine)
        ):
            raise ValueError(
                f"{folder} was saved with {name}={shortened(value)}, but the classifier has {shortened(mine)}; give "
                "it the same settings, or write verify=False."
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _take(classifier: Any, contents: Contents, folder: Path, verify: bool) -> None:
    """Take over what a folder holds. What can fail comes first."""
    description, weights, routes = contents.description, contents.weights, dict(contents.description.routes)
    if list(routes) != list(classifier.tasks):
        names = [", ".join(names)[:150] for names in (routes, classifier.tasks)]
        raise ValueError(f"{folder} is of the tasks {names[0]}, but the classifier has {names[1]}.")
    if not classifier.uses_prompts:
        # An early version called some adapters otherwise, since it left out accents.
        routes_before = {route: classifier.routes[task] for task, route in routes.items()}
        if [routes_before.get((adapter,)) for adapter in weights] != [(adapter,) for adapter in classifier.adapters]:
            names = [", ".join(names)[:150] for names in (weights, classifier.adapters)]
            raise ValueError(f"{folder} holds the adapters {names[0]}, but the classifier has {names[1]}.")
        weights, routes = dict(zip(classifier.adapters, weights.values())), dict(classifier.routes)
    for adapter, tensors in weights.items():
        needed = classifier.adapter_set.needed_state(adapter, tensors)
        check_shapes(tensors, needed, folder / adapter / WEIGHTS_FILE)
    prototypes = classifier.prototypes  # of the base alone, so they stay right if the folder has none
    if contents.prototypes is not None:
        path, size = folder / PROTOTYPES_FILE, feature_size(classifier.clip)
        prototypes = Prototypes.from_tensors(contents.prototypes, classifier.tasks, size, path)
    _check_unchanged(description, folder, verify)
    if classifier.adapters != list(weights):
        classifier.replace_adapters(list(weights))
    for adapter, tensors in weights.items():
        classifier.load_adapter_state(adapter, tensors)
    classifier.routes, classifier.record, classifier.grouping = routes, description.record, description.grouping
    classifier.prototypes = prototypes


def _check_unchanged(description: Description, folder: Path, verify: bool) -> None:
    if verify and not description.unchanged:
        raise ValueError(
            f"{folder / TASKS_FILE} is damaged or was changed after it was saved; restore it, or {WITHOUT_CHECK}."
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
    base, name = description.base, description.base_model
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
    _check_unchanged(description, folder, verify)
    check_sizes(config, model, contents.weights)
    try:
        classifier = cls(model, processor, description.tasks, config, text_chunk=text_chunk)
    except ValueError as error:
        raise ValueError(f"The classifier in {folder} cannot be made: {str(error)[:350]}") from error
    _take(classifier, contents, folder, verify)
    _report(base.differences(classifier), found)
    return classifier.eval()


def _download(source: Any, subfolder: str | None, **download: Any) -> Path:
    """A classifier's folder, which is downloaded if `source` is no folder."""
    inside = repository.check_subfolder(subfolder)
    if not os.path.isdir(source):
        parts = (f"*/{CONFIG_FILE}", f"*/{WEIGHTS_FILE}")
        files = (TASKS_FILE, ROOT_CONFIG, PROTOTYPES_FILE, AFFINITY_FILE, *parts)
        patterns = [(Path(inside) / file).as_posix() for file in files]
        with repository.hub_errors(str(source), download.get("revision")):
            source = snapshot_download(str(source), allow_patterns=patterns, **download)
    return Path(source) / inside

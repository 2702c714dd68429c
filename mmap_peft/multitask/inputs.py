"""Checks what a classifier is made from."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils import logging

from ..checking import Count, Seed, checked, shortened
from ..registration import known_methods
from ..tuner.attention import takes_prompts
from ..tuner.container import plain_name
from .task import Task


logger = logging.get_logger(__name__)


def check_task_object(task: Any, name: str = "task") -> None:
    """Raise a `ValueError` if something is no [`Task`]."""
    if not isinstance(task, Task):
        raise ValueError(f"Invalid value {shortened(task)} for `{name}`: expected a Task(name, class_names).")


def check_contexts(task: Task, contexts: int | None) -> None:
    """Raise a `ValueError` if prompts of this number of classes, each with its own, do not fit a task."""
    if contexts is None:
        return
    if len(task.class_names) != contexts:
        raise ValueError(
            f"Task {task.name!r} has {len(task.class_names)} classes, but num_classes={contexts} contexts were "
            "asked for; give tasks with this number of classes, or leave num_classes out."
        )
    if not task.trains_all_classes:
        raise ValueError(
            f"Task {task.name!r} has classes_for_training, but with num_classes={contexts} each class has prompts of "
            "its own, and those of the other classes would never be trained; leave out one of the two."
        )


def check_optimizer(classifier: Any, args: Any, optimizer: Any) -> None:
    """Raise a `ValueError` if an optimizer would change the rows of probes for classes that are not trained, and warn
    of the default learning rate where it is far too high for the method."""
    default, config = type(args).learning_rate, classifier.adapter_config
    known = known_methods().get(config.peft_type)
    used = {group.get("initial_lr") for group in optimizer.param_groups}
    if known and used == {default} and default > 10 * known.learning_rate:
        logger.warning_once(
            f"learning_rate={default}, which is also the default, is far more than usual for {type(config).__name__}; "
            f"starting_learning_rate(config) is {known.learning_rate}."
        )
    restricted = [task for task in classifier.tasks.values() if not task.trains_all_classes]
    parts = [classifier.adapter_set.class_parameters(task.adapter) for task in restricted]
    weights = {parameter for part in parts for parameter in part.values()}
    for group in optimizer.param_groups:
        if group.get("weight_decay") and weights.intersection(group["params"]):
            raise ValueError(
                f"weight_decay={group['weight_decay']} would also shrink the rows of probes for classes that "
                "are not among classes_for_training; write weight_decay=0.0."
            )


def check_inputs(model: Any, processor: Any, tasks: Any, seed: Any, text_chunk: Any) -> None:
    """Raise a `ValueError` if one of these arguments of a `MultiTaskClassifier` is not what its docstring says."""
    checked(seed, Seed, "seed")
    checked(text_chunk, Count | None, "text_chunk")
    if isinstance(tasks, Task | str | dict) or not hasattr(tasks, "__iter__"):
        raise ValueError(f"Invalid value {shortened(tasks)} for `tasks`: expected a list with one Task or more.")
    for number, task in enumerate(tasks):
        check_task_object(task, f"tasks[{number}]")
    if not len(tasks):
        raise ValueError("A MultiTaskClassifier was given no task; give a list with one Task or more.")
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            raise ValueError(
                f"Invalid {type(processor).__name__} for `processor`: it has no {part}; write "
                "load_processor(name) with the name of the CLIP."
            )
    if not isinstance(model, nn.Module) or not all(hasattr(model, part) for part in ("config", "get_image_features")):
        raise ValueError(
            f"Invalid {type(model).__name__} for `model`: expected a CLIP, such as CLIPModel.from_pretrained(name)."
        )
    _check_model(model)


def _check_model(model: nn.Module) -> None:
    """Raise a `ValueError` if a model cannot be the base of a classifier."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if layers:
        keys = (
            name for layer in layers for attribute in layer.adapter_layer_names for name in getattr(layer, attribute)
        )
        adapters = ", ".join(dict.fromkeys(map(plain_name, keys)))
        raise ValueError(
            f"The {type(model).__name__} has the adapters {adapters} already, of another classifier or of "
            "get_peft_model; load the CLIP again, or remove them by unload() of that classifier or model."
        )
    if takes_prompts(model):
        raise ValueError(
            f"Layers of the {type(model).__name__} have prompts already, of another model that shares them; load the "
            "CLIP anew, or take them out with unload() of what they belong to."
        )
    if model.config.model_type == "siglip2":
        raise ValueError(
            "Siglip2Model takes images of any size as patches, which a MultiTaskClassifier does not make; give a "
            "checkpoint of SigLIP 2 with a fixed resolution, which is a SiglipModel."
        )

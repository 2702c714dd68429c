"""One frozen CLIP that classifies the images of many tasks."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..methods.linear_probe import LinearProbeConfig, start_probe
from ..prompts.base import PromptConfig
from ..tuner.model import RESERVED
from ..tuner.routing import Route, use_routes
from . import exporting, saving
from .exporting import TaskClassifier
from .grouping import TaskGrouping
from .images import IGNORED
from .processes import is_sharded
from .record import TrainingRecord
from .task import Task
from .text_features import TextMemory, encode
from .texts import Texts


GLOBAL = "global"  # the one adapter of all tasks before they are grouped


@dataclass
class MultiTaskOutput(ModelOutput):
    """What `MultiTaskClassifier` returns.

    Args:
        loss (`torch.Tensor`, *optional*): cross entropy over each image's own classes, mean over the images.
        logits (`torch.Tensor`): (batch, classes of the task with most of them); -inf beyond an image's own classes.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Prediction(NamedTuple):
    """Classes of some images.

    Attributes:
        labels: the most probable class name of each image.
        probabilities: (images, classes of the task with most of them), in the order of the class names of each image's
            task; 0 beyond them.
    """

    labels: list[str]
    probabilities: torch.Tensor


class MultiTaskClassifier(nn.Module):
    """A frozen CLIP, its adapters, and the tasks that use them.

    A task has no decoder: its class names' text features classify its image features. Whose adapters it uses is its
    *route*. At first every task uses the adapter `"global"`. With prompts, after `set_grouping`, a task uses those of
    its group and its own, in this order: `("group_0", "art")`. Any other method has one adapter for all tasks, since
    two cannot be joined; a linear probe has one for each task.

    Args:
        model (`PreTrainedModel`): a CLIP with `get_text_features` and `get_image_features`. Adapters are put into it.
        processor: its processor, with `tokenizer` and `image_processor`.
        tasks (`Sequence[Task]`): the tasks.
        config (`PeftConfig`, *optional*): the method: prompts (`MmAPConfig()`), one of PEFT's (`lora_config()`), or
            another of this library (`BitFitConfig()`). Without it there are no adapters: zero-shot.
        seed (`int`): seed of the adapters' initial values.
        text_chunk (`int`, *optional*): so many texts are encoded at a time, and in training once more in the backward
            pass: memory no longer grows with the number of classes, and nothing else changes.

    Attributes:
        record (`TrainingRecord`): how it was trained and how well it does, filled by a trainer, for the model card.
        trained_adapters (`set[str]`): names of the adapters that were loaded or that a trainer has begun to train.
            `MultiTaskTrainer` never replaces adapters once there is one; `reset_adapters` does.

    Raises:
        ValueError: no task, tasks whose names collide, or a text that is longer than the text tower's positions.
    """

    main_input_name = "pixel_values"  # which a Trainer hands to compute_metrics, if include_for_metrics asks for it

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        tasks: Sequence[Task],
        config: PeftConfig | None = None,
        seed: int = 0,
        text_chunk: int | None = None,
    ) -> None:
        super().__init__()
        if text_chunk is not None and text_chunk < 1:
            raise ValueError(f"text_chunk={text_chunk} encodes no text; write 1 or more, or None for all at once.")
        if model.config.model_type == "siglip2":
            raise ValueError(
                "Siglip2Model takes images of any size as patches, which a MultiTaskClassifier does not make; give a "
                "checkpoint of SigLIP 2 with a fixed resolution, which is a SiglipModel."
            )
        self.processor, self.adapter_config, self.grouping = processor, copy.deepcopy(config), None
        self.record, self.text_chunk = TrainingRecord(), text_chunk
        self.trained_adapters: set[str] = set()
        self.tasks: dict[str, Task] = {}
        self.routes: dict[str, Route] = {}
        self.texts = Texts(processor.tokenizer, model.config.text_config, config)
        self._text_memory = TextMemory()
        self._given_texts: dict[str, torch.Tensor] = {}
        if self.texts.placeholders and config.init_ids is None:
            self.adapter_config.init_ids = self.texts.first_words(config.num_prompts)
        self.model = model.requires_grad_(False)
        self.probes = nn.ModuleList() if isinstance(config, LinearProbeConfig) else None  # in the order of the tasks
        if config is not None and self.probes is None:
            with _seeded(seed):
                self.model = get_peft_model(model, copy.deepcopy(self.adapter_config), adapter_name=GLOBAL)
        if not tasks:
            raise ValueError("A MultiTaskClassifier was given no task; give a list with one Task or more.")
        for task in tasks:
            self._enter(task, self._first_route(task))

    def _first_route(self, task: Task) -> Route:
        """A task's route before there are groups."""
        if self.adapter_config is None:
            return ()
        return (GLOBAL,) if self.probes is None else (task.adapter,)

    def _enter(self, task: Task, route: Route) -> None:
        taken = {other.adapter: name for name, other in self.tasks.items()}
        if task.adapter in taken:
            raise ValueError(
                f"Tasks {taken[task.adapter]!r} and {task.name!r} would both have the adapter {task.adapter!r}; "
                "rename one."
            )
        if task.adapter == GLOBAL or task.adapter.startswith("group_"):
            raise ValueError(
                f"Task {task.name!r} would have the adapter {task.adapter!r}, a name that is kept for prompts of "
                "several tasks; rename it."
            )
        contexts = getattr(self.adapter_config, "num_classes", None)
        if contexts not in (None, len(task.class_names)):
            raise ValueError(
                f"Task {task.name!r} has {len(task.class_names)} classes, but num_classes={contexts} contexts were "
                "asked for; give tasks with as many classes, or leave num_classes out."
            )
        self.texts.of(task, route)
        self.tasks[task.name], self.routes[task.name] = task, route
        if self.probes is not None:
            self.probes.append(self._start_probe(task.name))

    def _start_probe(self, task: str) -> nn.Linear:
        with torch.no_grad(), self.evaluating():
            return start_probe(self.encode_texts([task])[0])

    @property
    def clip(self) -> PreTrainedModel:
        """The CLIP itself."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        return self.clip.device

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters, those of groups first."""
        if self.probes is not None:
            return [task.adapter for task in self.tasks.values()]
        return list(self.model.peft_config) if isinstance(self.model, PeftModel) else []

    @property
    def prompted(self) -> bool:
        """Whether the adapters are prompts, which a task can use several of."""
        return isinstance(self.adapter_config, PromptConfig)

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by name."""
        if self.probes is not None:
            return dict(self._probe(adapter).named_parameters())
        if self.prompted:
            return dict(self.clip.mmap.mmap_generators[adapter].named_parameters())
        found = ((f"{name}.", parameter) for name, parameter in self.clip.named_parameters())
        return {name.replace(f".{adapter}.", ".")[:-1]: tensor for name, tensor in found if f".{adapter}." in name}

    def _probe(self, adapter: str) -> nn.Linear:
        return self.probes[self.adapters.index(adapter)]

    @property
    def base_size(self) -> int:
        """Number of the base's parameters."""
        # A copy of a base's module that an adapter trains is no part of the base.
        parts = ("mmap.", ".modules_to_save.", f".{GLOBAL}.")
        sizes = {f"{name}.": parameter.numel() for name, parameter in self.clip.named_parameters()}
        return sum(size for name, size in sizes.items() if not any(part in name for part in parts))

    # ---- forward

    def forward(
        self, pixel_values: torch.Tensor, task_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> MultiTaskOutput:
        """Classify images of any tasks in one pass.

        Args:
            pixel_values (`torch.Tensor`): (batch, 3, H, W).
            task_ids (`torch.Tensor`): (batch,), number of each image's task in `tasks`.
            labels (`torch.Tensor`, *optional*): (batch,), number of each image's class; -100 is left out of the loss.
        """
        present = torch.unique(task_ids).tolist()
        names = [name for number, name in enumerate(self.tasks) if number in present]
        place = torch.full((len(self.tasks),), -1, device=task_ids.device)
        place[present] = torch.arange(len(present), device=task_ids.device)
        rows = place[task_ids]  # number of each image's task among those present

        weight, bias = self._class_weights(names)
        routes = [self.routes[name] for name in names]
        distinct = list(dict.fromkeys(routes))
        number = torch.tensor([distinct.index(route) for route in routes], device=rows.device)
        routed = use_routes(self.clip, distinct, vision=number[rows], pooled=True) if self.prompted else nullcontext()
        with routed:
            image = F.normalize(self.clip.get_image_features(pixel_values).pooler_output, dim=-1)
        widths = [len(task.class_names) for task in self.tasks.values()]
        column = torch.arange(max(widths), device=rows.device)
        counts = torch.tensor([len(self.tasks[name].class_names) for name in names], device=rows.device)
        starts = counts.cumsum(0) - counts
        # (batch, classes of all tasks present)
        every = self.clip.logit_scale.exp() * image.to(weight.dtype) @ weight.T + bias
        own = column < counts[rows][:, None]
        chosen = torch.where(own, starts[rows][:, None] + column, 0)
        logits = every.gather(1, chosen).masked_fill(~own, float("-inf"))
        loss = None
        if labels is not None:
            loss = task_losses(logits, labels, task_ids, len(self.tasks)).sum()
        return MultiTaskOutput(loss=loss, logits=logits)

    def _class_weights(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | float]:
        """What classifies unit image features: weight (classes of all these tasks, dim) and bias (classes) or 0."""
        if self.probes is None or not all(self.routes[name] for name in names):
            return torch.cat(self._text_features(names)), 0.0
        probes = [self._probe(self.tasks[name].adapter) for name in names]
        return torch.cat([probe.weight for probe in probes]), torch.cat([probe.bias for probe in probes])

    def _text_features(self, names: Sequence[str]) -> list[torch.Tensor]:
        """Unit text features of each task's classes, (classes, dim); from memory if nothing has changed."""
        if self._given_texts:
            return [self._given_texts[name] for name in names]
        parameters = self._text_parameters()
        learning = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        random = self.training and getattr(self.clip.config.text_config, "attention_dropout", 0.0) > 0
        # A sharded tower runs on all processes at once or on none, whatever tasks are present on each.
        if learning or random or is_sharded(self):
            self._text_memory.clear()
            return self.encode_texts(names)
        autocast = torch.is_autocast_enabled(self.device.type)
        keys = {name: (name, self.routes[name], autocast) for name in names}
        return self._text_memory(keys, parameters, self.encode_texts)

    def _text_parameters(self) -> list[nn.Parameter]:
        """What the texts' features depend on: everything but prompts of a method that has none in the text tower."""
        everything = not self.prompted or "text" in self.adapter_config.towers
        return [parameter for name, parameter in self.named_parameters() if everything or ".mmap." not in name]

    def alike_texts(self, names: Sequence[str]) -> list[tuple[Route, int]]:
        """For each of these tasks its route and a number of its texts; where both are the same, features are, too."""
        return [(self.routes[name], id(self.texts.of(self.tasks[name], self.routes[name]))) for name in names]

    def encode_texts(self, names: Sequence[str]) -> list[torch.Tensor]:
        """Unit text features of each of these tasks' classes, (classes, dim), never from memory."""
        alike = self.alike_texts(names)
        distinct = dict(zip(alike, names))
        tasks, routes = [self.tasks[name] for name in distinct.values()], [route for route, _ in distinct]
        batch, prompted = self.texts.batch(tasks, routes), routes if self.prompted else None
        features = encode(self.clip, batch, prompted, self.text_chunk, share=not is_sharded(self))
        parts = dict(zip(distinct, features.split([len(task.class_names) for task in tasks])))
        return [parts[key] for key in alike]

    def check_task(self, task: str) -> None:
        """Raise a `ValueError` if there is no task of this name."""
        if task not in self.tasks:
            raise ValueError(f"{task!r} is none of the tasks; write one of {', '.join(self.tasks)}.")

    @torch.no_grad()
    def predict(self, images: Image.Image | Sequence[Image.Image], task: str | Sequence[str]) -> Prediction:
        """Classify images, all in one batch.

        Args:
            images (`PIL.Image.Image` or a list of them): the images.
            task (`str` or a list of them): name of their task, or of the task of each.

        Raises:
            ValueError: a name is none of a task, or there are more or less of them than images.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        tasks = [task] * len(images) if isinstance(task, str) else list(task)
        if len(tasks) != len(images):
            raise ValueError(
                f"{len(tasks)} tasks were given for {len(images)} images; write one a image, or one for all of them."
            )
        for name in dict.fromkeys(tasks):
            self.check_task(name)
        processed = self.processor.image_processor(
            images=[image.convert("RGB") for image in images], return_tensors="pt"
        )
        numbers = [list(self.tasks).index(name) for name in tasks]
        with self.evaluating():
            pixels = processed["pixel_values"].to(self.device)
            logits = self(pixels, torch.tensor(numbers, device=self.device)).logits
        classes = [self.tasks[name].class_names for name in tasks]
        probabilities = logits[:, : max(map(len, classes))].float().softmax(-1).cpu()
        labels = [names[number] for names, number in zip(classes, probabilities.argmax(-1).tolist())]
        return Prediction(labels, probabilities)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the `with` block nothing is in training mode."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training

    @contextmanager
    def rerouted(self, routes: dict[str, Route]) -> Iterator[dict[str, torch.Tensor]]:
        """Inside the `with` block each task uses another route.

        Args:
            routes: the route of every task, by its name.

        Yields:
            an empty dict: if the unit text features of every task are put into it, they are taken instead of encoding
            the texts.
        """
        before = self.routes, self._given_texts
        self.routes, self._given_texts = routes, {}
        try:
            yield self._given_texts
        finally:
            self.routes, self._given_texts = before

    @contextmanager
    def zero_shot(self) -> Iterator[None]:
        """Inside the `with` block all tasks use the plain CLIP."""
        trained = {parameter: parameter.requires_grad for parameter in self.parameters()}
        routed = self.prompted or not isinstance(self.model, PeftModel)
        try:
            with (
                self.rerouted(dict.fromkeys(self.routes, ())),
                nullcontext() if routed else self.model.disable_adapter(),
            ):
                yield
        finally:
            for parameter, flag in trained.items():  # which PEFT sets as it likes
                parameter.requires_grad_(flag)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """As CLIP's own: store less for the backward pass and compute more."""
        self.clip.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """The same, by its name up to transformers 5.20, the last for Python 3.10."""
        self.clip.gradient_checkpointing_enable(**kwargs)

    # ---- adapters

    def set_grouping(self, grouping: TaskGrouping, seed: int = 0) -> None:
        """Give every group and every task an adapter of its own, in place of those that were there.

        A group's prompts start as a copy of the global ones, if there are any (a choice of this library), a task's at
        random. All of them train.

        Args:
            grouping (`TaskGrouping`): a partition of exactly these tasks.
            seed (`int`): seed of the initial values.

        Raises:
            ValueError: the grouping is one of other tasks, or the method is none of prompts.
        """
        self.check_grouping()
        if sorted(grouping.tasks) != sorted(self.tasks):
            raise ValueError(
                f"The grouping is one of {sorted(grouping.tasks)}, but the classifier has {sorted(self.tasks)}; make "
                "one of the same tasks."
            )
        shared = self.adapter_parameters(GLOBAL) if GLOBAL in self.adapters else {}
        shared = {name: parameter.detach().clone() for name, parameter in shared.items()}
        groups = {f"group_{number}": members for number, members in enumerate(grouping.groups)}
        names = [*groups, *(task.adapter for task in self.tasks.values())]
        self.fresh_adapters(names, seed)
        for group, members in groups.items():
            for name, parameter in self.adapter_parameters(group).items():
                if name in shared:
                    parameter.data.copy_(shared[name])
            self.routes.update({task: (group, self.tasks[task].adapter) for task in members})
        self.grouping = grouping

    def check_grouping(self) -> None:
        """Raise a `ValueError` if the method can have no groups, or a task no adapter of its own."""
        if not self.prompted:
            method = "zero-shot" if self.adapter_config is None else type(self.adapter_config).__name__
            raise ValueError(
                f"A task joins its group's prompts to its own, but {method} has no prompts to join; train without "
                "groups, by MultiTaskTrainer.train() with the default of grouping."
            )
        for task in self.tasks.values():
            if task.adapter in RESERVED or hasattr(nn.ModuleDict, task.adapter):
                raise ValueError(
                    f"{task.adapter!r} cannot name an adapter, so task {task.name!r} cannot have one of its own; "
                    "rename the task, or write sharing='all'."
                )

    def share_one_adapter(self, seed: int = 0) -> None:
        """Give all tasks one global adapter, as at the beginning, unless it is that already."""
        if self.adapters != [GLOBAL]:
            self.check_grouping()
            self.fresh_adapters([GLOBAL], seed)
            self.routes, self.grouping = dict.fromkeys(self.tasks, (GLOBAL,)), None

    def separate_adapters(self, seed: int = 0) -> None:
        """Give each task an adapter of its own, in place of those that were there, and nothing that tasks share."""
        self.check_grouping()
        self.fresh_adapters([task.adapter for task in self.tasks.values()], seed)
        self.routes, self.grouping = {name: (task.adapter,) for name, task in self.tasks.items()}, None

    def add_task(self, task: Task, group: str | None = None, seed: int = 0) -> None:
        """Teach a trained classifier one more task: from now on only the new task's prompts, or its probe, train.

        The one adapter of any other method goes on training for all tasks, the new one too.

        Args:
            task (`Task`): the task.
            group (`str`, *optional*): the group whose prompts it uses besides its own, or a task of that group.
                `None`: its own alone.
            seed (`int`): seed of the initial values.

        Raises:
            ValueError: no such group, a task without a group, or a task that does not fit: a name that is taken or
                cannot name an adapter, or a text that is too long. Nothing has changed then.
        """
        if self.adapter_config is None:
            raise ValueError("A classifier without a config is zero-shot and cannot learn a task; give a config.")
        if group is not None:
            self.check_grouping()
        group = None if group is None else self._group_adapter(group)
        adapter, tasks, routes = task.adapter, dict(self.tasks), dict(self.routes)
        trained = {parameter: parameter.requires_grad for parameter in self.parameters()}
        try:
            if self.prompted:
                self._enter(task, (adapter,) if group is None else (group, adapter))
                with _seeded(seed):
                    self.model.add_adapter(adapter, copy.deepcopy(self.adapter_config))
                self.grouping = self._grouping_with(task.name, group)
            else:
                self._enter(task, self._first_route(task))
            self.train_adapters([self.routes[task.name][-1]])
        except Exception:
            self.tasks, self.routes = tasks, routes
            if task.name not in tasks:
                self.texts.forget(task)
            for parameter, flag in trained.items():
                parameter.requires_grad_(flag)
            raise

    def _group_adapter(self, group: str) -> str:
        """The adapter of a group that is given by its own name or by that of one of its tasks."""
        groups = [name for name in self.adapters if name == GLOBAL or name.startswith("group_")]
        if group in self.tasks and self.routes[group][0] not in groups:
            raise ValueError(
                f"Task {group!r} is in no group, so there are no prompts to share with it; write group=None, for "
                f"prompts of the new task alone{', or one of ' + ', '.join(groups) if groups else ''}."
            )
        name = self.routes[group][0] if group in self.tasks else group
        if name not in groups:
            raise ValueError(f"{group!r} is no group or task; write one of {', '.join([*groups, *self.tasks])}.")
        return name

    def _grouping_with(self, task: str, group: str | None) -> TaskGrouping | None:
        """The grouping with one more task, in a group's adapter or in no group."""
        if self.grouping is None:
            return None
        groups = [list(members) for members in self.grouping.groups]
        mates = [name for name, route in self.routes.items() if route[0] == group and name != task]
        if group is None or not mates:
            groups.append([task])
        else:
            next(members for members in groups if mates[0] in members).append(task)
        return TaskGrouping([*self.grouping.tasks, task], groups, mode="given")

    def users(self) -> dict[nn.Parameter, list[int]]:
        """For each parameter that trains, the numbers of the tasks that use it."""
        numbers = {name: number for number, name in enumerate(self.tasks)}
        return {
            parameter: [numbers[name] for name, route in self.routes.items() if adapter in route]
            for adapter in self.adapters
            for parameter in self.adapter_parameters(adapter).values()
            if parameter.requires_grad
        }

    @property
    def training_tasks(self) -> list[str]:
        """Names of the tasks that use an adapter which trains."""
        training = set(self.training_adapters)
        return [name for name, route in self.routes.items() if training & set(route)]

    @property
    def training_adapters(self) -> list[str]:
        """Names of the adapters that train."""
        return [
            adapter
            for adapter in self.adapters
            if any(parameter.requires_grad for parameter in self.adapter_parameters(adapter).values())
        ]

    def train_adapters(self, adapters: Sequence[str]) -> None:
        """Let exactly these adapters train."""
        if self.probes is not None:
            for adapter in self.adapters:
                self._probe(adapter).requires_grad_(adapter in adapters)
            return
        self.model.base_model.set_requires_grad(self.adapters, requires_grad=False)
        self.model.base_model.set_requires_grad(list(adapters), requires_grad=True)

    def fresh_adapters(self, names: Sequence[str], seed: int = 0) -> None:
        """New adapters with these names in place of all that were there; all of them train."""
        base = self.model.unload()
        with _seeded(seed):
            self.model = get_peft_model(base, copy.deepcopy(self.adapter_config), adapter_name=names[0])
            for name in names[1:]:
                self.model.add_adapter(name, copy.deepcopy(self.adapter_config))
        self.model.train(self.training)
        self.train_adapters(names)
        self.record.prompted, self.trained_adapters = {}, set()

    def reset_adapters(self, seed: int = 0) -> None:
        """Replace all adapters by new ones, as they were when the classifier was made: what they learned is lost.

        Args:
            seed (`int`): seed of the initial values.

        Raises:
            ValueError: the classifier has no adapters.
        """
        if self.adapter_config is None:
            raise ValueError("A classifier without a config has no adapters to reset; give a config.")
        self.routes = {name: self._first_route(task) for name, task in self.tasks.items()}
        self.grouping, self.record = None, TrainingRecord(zero_shot=self.record.zero_shot)
        if self.probes is None:
            self.fresh_adapters([GLOBAL], seed)
        else:
            self.probes, self.trained_adapters = nn.ModuleList(map(self._start_probe, self.tasks)), set()

    # ---- files

    def adapter_state(self, adapter: str) -> dict[str, torch.Tensor]:
        """The tensors of an adapter's file, by their names there."""
        if self.probes is not None:
            return self._probe(adapter).state_dict()
        return get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)

    def load_adapter_state(self, adapter: str, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `adapter_state`; the adapter counts as trained."""
        self.trained_adapters.add(adapter)
        if self.probes is not None:
            self._probe(adapter).load_state_dict(tensors)
        else:
            set_peft_model_state_dict(self.model, tensors, adapter_name=adapter)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `tasks.json`, a model card, and a folder for each adapter, which is a PEFT adapter of its own."""
        saving.save(self, Path(folder))

    def load_adapters(self, folder: str | os.PathLike) -> None:
        """Take routes, grouping and all adapters from a folder that `save_pretrained` wrote.

        Raises:
            ValueError: the folder is of other tasks, or a file is missing or damaged; nothing has changed then.
        """
        saving.load(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        model: PreTrainedModel | None = None,
        processor: Any = None,
        **download: Any,
    ) -> MultiTaskClassifier:
        """Load a classifier from a folder or from the Hub.

        Args:
            name_or_path: a folder that `save_pretrained` wrote, or the id of a repository on the Hub.
            model (`PreTrainedModel`, *optional*): the base. `None`: the one that was trained on, by its name or path.
            processor (*optional*): the base's processor.
            download: `subfolder` (`str`), the classifier's folder inside; `revision`, `token`, `cache_dir` and the
                like, for the Hub. Token and cache are the base's, too.

        Raises:
            ValueError: a name or subfolder that can be none, a file is missing or damaged, or the base is not to be
                found and was not given.
            OSError: the Hub has no such repository or revision, or cannot be reached.
        """
        return saving.from_pretrained(cls, name_or_path, model, processor, **download)

    def export(self, task: str, format: str = "torch", path: str | os.PathLike | None = None) -> TaskClassifier | Path:
        """Make an image classifier of one task: pixels (batch, 3, H, W) in, probabilities (batch, classes) out.

        The prompts' keys and values and the texts' features become constants, and what other methods learned becomes
        part of the weights, so that it needs no text tower and no other task. Only bottleneck adapters, which cannot,
        stay layers of their own. It is float32, and a copy: what becomes of this classifier later does not reach it.

        ```python
        served = classifier.export("print")  # a module that torch alone runs
        session = onnxruntime.InferenceSession(classifier.export("print", format="onnx"))
        ```

        Args:
            task (`str`): name of the task.
            format (`str`): `"torch"` returns a `TaskClassifier`, and with `path` writes it to a file for
                `torch.export.load` besides. `"onnx"` writes a file for any ONNX runtime and returns its path; it
                needs `pip install mmap_peft[onnx]`. In both files the batch is of any size, the input is called
                `pixel_values`, and `TaskClassifier.metadata` is there: as an ONNX model's metadata, or as the
                `extra_files` of `torch.export.load`.
            path (`str`, *optional*): a file that ends in `.pt2` or `.onnx`, or a folder for one that is named after
                the task's adapter. `None`: nothing is written for torch, and for ONNX the current folder. A file that
                is there is replaced once the new one is whole.

        Raises:
            ValueError: no such task or format, or a path with another ending.
            ImportError: ONNX's packages are not installed.
        """
        return exporting.export(self, task, format, path)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Upload what `save_pretrained` writes to a repository on the Hub, in one commit.

        Args:
            repo_id (`str`): for example `"me/clip-mmap-office-home"`; made if it is not there.
            options: `token`; `private`, for a repository that is made; `revision`, a branch, made if it is not there;
                `subfolder`, a folder inside; `parent_commit`, the full id of the commit that the branch must still be
                at; `commit_message`.

        Returns:
            `CommitInfo`: its `oid` is the commit's id, its `commit_url` the address.

        Raises:
            ValueError: a name or subfolder that can be none.
            OSError: the Hub refused, the connection broke, or the branch has moved on from `parent_commit`. Nothing
                of the push is in the branch then.
        """
        return saving.push(self, repo_id, **options)


def task_losses(logits: torch.Tensor, labels: torch.Tensor, task_ids: torch.Tensor, tasks: int) -> torch.Tensor:
    """What each task adds to the loss of a batch, which is the mean over its images: (tasks,)."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    sums = losses.new_zeros(tasks).index_add(0, task_ids, losses)
    # Over at least one: a batch of unreadable images only has the loss 0, not NaN.
    return sums / (labels != IGNORED).sum().clamp(min=1)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed inside, and as if nothing had happened outside."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield

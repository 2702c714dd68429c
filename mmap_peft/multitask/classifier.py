"""One frozen CLIP that classifies the images of many tasks."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from huggingface_hub import CommitInfo
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..export import files
from ..export.merging import merged
from ..export.task_classifier import TaskClassifier
from ..tuner.assemble import AdapterPrompts, Prompts, Route
from ..tuner.context import ContextValue
from ..tuner.fingerprint import Fingerprint
from . import saving
from .adapters import ProbeSet, make_adapters
from .class_texts import ClassTexts
from .evaluation_mode import EvaluationMode
from .images import IGNORED
from .processes import is_sharded
from .record import TrainingRecord
from .task import Task
from .task_adapters import TaskAdapters
from .text_features import TextFeatureCache, encode_texts


# Routes that `override_routes` set, each with the classifier that they are for.
_overrides: ContextValue[tuple[tuple[nn.Module, Mapping[str, Route]], ...]] = ContextValue("mmap_peft_tasks", ())


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


class MultiTaskClassifier(TaskAdapters):
    """A frozen CLIP, its adapters, and the tasks that use them.

    A task has no decoder: its class names' text features classify its image features. Whose adapters it uses is its
    *route*. At first every task uses the adapter `"global"`. With prompts, after `set_grouping`, a task uses those of
    its group and its own, in this order: `("group_0", "art")`. Any other method has one adapter for all tasks, since
    two cannot be joined; a linear probe has one for each task.

    Several threads may predict at once, with different tasks and inside or outside of `zero_shot`.

    Args:
        model (`PreTrainedModel`): a CLIP with `get_text_features` and `get_image_features`. Adapters are put into it,
            so that it can be the base of one classifier only.
        processor: its processor, with `tokenizer` and `image_processor`.
        tasks (`Sequence[Task]`): the tasks.
        config (`PeftConfig`, *optional*): the method: prompts (`MmAPConfig()`), one of PEFT's (`lora_config()`), or
            another of this library (`BitFitConfig()`). Without it there are no adapters: zero-shot.
        seed (`int`): seed of the adapters' initial values.
        text_chunk (`int`, *optional*): so many texts are encoded at a time, and in training once more in the backward
            pass: memory no longer grows with the number of classes, and nothing else changes.

    Raises:
        ValueError: no task, tasks whose names collide, a text that is longer than the text tower's positions, settings
            that do not fit the model, or a model that has adapters already. The model is as it was then.
    """

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
        _check_model(model)
        if text_chunk is not None and text_chunk < 1:
            raise ValueError(f"text_chunk={text_chunk} encodes no text; write 1 or more, or None for all at once.")
        if not tasks:
            raise ValueError("A MultiTaskClassifier was given no task; give a list with one Task or more.")
        self.processor, self.text_chunk = processor, text_chunk
        self.tasks, self.routes, self.grouping = {}, {}, None
        self.trained_adapters, self.record = set(), TrainingRecord()
        config = copy.deepcopy(config)
        self.texts = ClassTexts(processor.tokenizer, model.config.text_config, config)
        if self.texts.placeholders and config.init_ids is None:
            config.init_ids = self.texts.first_words(config.num_prompts)
        self._text_cache, self._evaluation_mode = TextFeatureCache(), EvaluationMode()
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            with torch.inference_mode(False):  # adapters that are made inside it could never train
                self.adapter_set = make_adapters(model.requires_grad_(False), config, seed)
                for task in tasks:
                    route = self.adapter_set.first_route(task.adapter)
                    self.check_new_task(task, route)
                    self._enter(task, route)
        except BaseException:
            if "adapter_set" in self._modules:
                self.unload()
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            raise

    def _enter(self, task: Task, route: Route) -> None:
        if isinstance(self.adapter_set, ProbeSet):
            with torch.inference_mode(False), torch.no_grad(), self.evaluating():
                features = self._encode({task.name: task}, {task.name: ()})[0]
            self.adapter_set.add(task.adapter, features)
        self.tasks = {**self.tasks, task.name: task}
        self.routes = {**self.routes, task.name: route}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        hook = getattr(self.clip, "_hf_hook", None)  # of accelerate, if weights are offloaded
        return torch.device(getattr(hook, "execution_device", None) or self.clip.device)

    # ---- forward

    def forward(
        self,
        pixel_values: torch.Tensor,
        task_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        text_features: Mapping[str, torch.Tensor] | None = None,
        given: Mapping[str, AdapterPrompts] | None = None,
    ) -> MultiTaskOutput:
        """Classify images of any tasks in one pass.

        Args:
            pixel_values (`torch.Tensor`): (batch, 3, H, W).
            task_ids (`torch.Tensor`): (batch,), number of each image's task in `tasks`.
            labels (`torch.Tensor`, *optional*): (batch,), number of each image's class; -100 is left out of the loss.
            text_features (`Mapping[str, torch.Tensor]`, *optional*): unit text features of each task's classes,
                (classes, dim), by the name of the task. `None`: they are computed.
            given (`Mapping[str, AdapterPrompts]`, *optional*): prompts that routes name besides the adapters.
        """
        present = torch.unique(task_ids).tolist()
        names = [name for number, name in enumerate(self.tasks) if number in present]
        place = torch.full((len(self.tasks),), -1, device=task_ids.device)
        place[present] = torch.arange(len(present), device=task_ids.device)
        rows = place[task_ids]  # number of each image's task among those present

        tasks, routes = self._tasks_and_routes(names)
        route_list = list(routes.values())
        texts = text_features or {}
        weight, bias = self.adapter_set.class_weights(
            route_list, lambda: [texts[name] for name in names] if texts else self._text_features(tasks, routes, given)
        )
        distinct = list(dict.fromkeys(route_list))
        number = torch.tensor([distinct.index(route) for route in route_list], device=rows.device)
        prompts = self.adapter_set.prompts("vision", distinct, given, vision=number[rows])
        image = F.normalize(self.clip.get_image_features(pixel_values, **_keyword(prompts)).pooler_output, dim=-1)
        logits = self._logits(image, weight, bias, [tasks[name] for name in names], rows)
        loss = None
        if labels is not None:
            loss = task_losses(logits, labels, task_ids, len(self.tasks)).sum()
        return MultiTaskOutput(loss=loss, logits=logits)

    def _logits(
        self,
        image: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | float,
        tasks: Sequence[Task],
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Logits of each image for the classes of its own task, which is the `rows`-th of the tasks."""
        widest = max(len(task.class_names) for task in self.tasks.values())
        column = torch.arange(widest, device=rows.device)
        counts = torch.tensor([len(task.class_names) for task in tasks], device=rows.device)
        starts = counts.cumsum(0) - counts
        # (batch, classes of all tasks present)
        every = self.logit_scale() * image.to(weight.dtype) @ weight.T + bias
        own = column < counts[rows][:, None]
        chosen = torch.where(own, starts[rows][:, None] + column, 0)
        return every.gather(1, chosen).masked_fill(~own, float("-inf"))

    def logit_scale(self) -> torch.Tensor:
        """CLIP's inverse temperature."""
        if not self.clip.logit_scale.is_meta:
            return self.clip.logit_scale.exp()
        with align_module_device(self.clip, self.device):  # offloaded by accelerate
            return self.clip.logit_scale.exp()

    def _tasks_and_routes(self, names: Sequence[str]) -> tuple[dict[str, Task], dict[str, Route]]:
        routes: Mapping[str, Route] = self.routes
        for classifier, others in _overrides.get():
            if classifier is self:
                routes = others
        return {name: self.tasks[name] for name in names}, {name: routes[name] for name in names}

    # ---- texts

    def class_weights(self, task: str) -> tuple[torch.Tensor, torch.Tensor | float]:
        """What classifies unit image features of a task: weight (classes, dim) and bias (classes) or 0."""
        tasks, routes = self._tasks_and_routes([task])
        return self.adapter_set.class_weights([routes[task]], lambda: self._text_features(tasks, routes))

    def _text_features(
        self,
        tasks: dict[str, Task],
        routes: dict[str, Route],
        given: Mapping[str, AdapterPrompts] | None = None,
    ) -> list[torch.Tensor]:
        """Unit text features of each task's classes, (classes, dim); from the cache if nothing has changed."""
        learning = torch.is_grad_enabled() and any(
            parameter.requires_grad for part in self.adapter_set.text_parameters() for parameter in part
        )
        random = self.training and getattr(self.clip.config.text_config, "attention_dropout", 0.0) > 0
        # A sharded tower runs on all processes at once or on none, whatever tasks are present on each.
        if learning or random or is_sharded(self):
            self._text_cache.clear()
        if given or learning or random or is_sharded(self):
            return self._encode(tasks, routes, given)
        state = torch.is_autocast_enabled(self.device.type), self.adapter_set.enabled
        keys = {name: (key, state) for name, key in zip(tasks, self._text_keys(tasks, routes))}
        return self._text_cache(
            keys,
            Fingerprint(*self.adapter_set.text_parameters()),
            lambda names: self._encode({name: tasks[name] for name in names}, routes),
        )

    def _text_keys(self, tasks: dict[str, Task], routes: dict[str, Route]) -> list[tuple[Route, int]]:
        """For each of these tasks its route and a number of its texts; where both are the same, features are, too."""
        return [(routes[name], id(self.texts.of(task, routes[name]))) for name, task in tasks.items()]

    def text_keys(self, names: Sequence[str]) -> list[tuple[Route, int]]:
        """For each of these tasks a key; tasks with the same key have the same text features."""
        return self._text_keys(*self._tasks_and_routes(names))

    def encode_texts(
        self, names: Sequence[str], given: Mapping[str, AdapterPrompts] | None = None
    ) -> list[torch.Tensor]:
        """Unit text features of each of these tasks' classes, (classes, dim), never from the cache.

        Args:
            names (`Sequence[str]`): names of the tasks.
            given (`Mapping[str, AdapterPrompts]`, *optional*): prompts that routes name besides the adapters.
        """
        return self._encode(*self._tasks_and_routes(names), given)

    def _encode(
        self,
        tasks: dict[str, Task],
        routes: dict[str, Route],
        given: Mapping[str, AdapterPrompts] | None = None,
    ) -> list[torch.Tensor]:
        keys = self._text_keys(tasks, routes)
        distinct = dict(zip(keys, tasks.values()))
        batch = self.texts.batch(list(distinct.values()), [route for route, _ in distinct])

        def prompts_of(rows: slice) -> Prompts | None:
            numbers = {"text": torch.tensor(batch.tasks[rows]), "classes": torch.tensor(batch.classes[rows])}
            return self.adapter_set.prompts("text", [route for route, _ in distinct], given, **numbers)

        features = encode_texts(self.clip, batch, prompts_of, self.device, self.text_chunk, not is_sharded(self))
        parts = dict(zip(distinct, features.split([len(task.class_names) for task in distinct.values()])))
        return [parts[key] for key in keys]

    # ---- prediction

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
        with self._evaluation_mode.of(self):
            yield

    @contextmanager
    def override_routes(self, routes: Mapping[str, Route]) -> Iterator[None]:
        """Inside the `with` block, in this thread, each task uses another route.

        Args:
            routes: the route of every task, by its name.
        """
        with _overrides.set((*_overrides.get(), (self, dict(routes)))):
            yield

    @contextmanager
    def zero_shot(self) -> Iterator[None]:
        """Inside the `with` block all tasks use the plain CLIP.

        With prompts, other threads are not concerned. The adapters of other methods are disabled for all threads.
        """
        with self.override_routes(dict.fromkeys(self.tasks, ())), self.adapter_set.disabled():
            yield

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """As CLIP's own: store less for the backward pass and compute more."""
        self.clip.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """The same, by its name up to transformers 5.20, the last for Python 3.10."""
        self.clip.gradient_checkpointing_enable(**kwargs)

    # ---- files

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

        The prompts and the texts' features become constants, and what other methods learned becomes part of the
        weights, so that it needs no text tower and no other task. Only bottleneck adapters, which cannot,
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
        self.check_task(task)
        return files.export(lambda: self._task_classifier(task), self.tasks[task].adapter, format, path)

    @torch.no_grad()
    def _task_classifier(self, task: str) -> TaskClassifier:
        route = self._tasks_and_routes([task])[1][task]
        clip = self.clip if self.uses_prompts else merged(self.model, bool(route))
        with self.evaluating():
            weight, bias = self.class_weights(task)
            prompts = self.adapter_set.prompts("vision", [route])
        weight, bias = self.logit_scale().float() * weight.float(), bias if isinstance(bias, torch.Tensor) else None
        names, processor = self.tasks[task].class_names, self.processor.image_processor
        return TaskClassifier(clip, prompts, weight, bias, task, names, processor)

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


def _keyword(prompts: Prompts | None) -> dict[str, Prompts]:
    return {} if prompts is None else {"prompts": prompts}


def _check_model(model: PreTrainedModel) -> None:
    """Raise a `ValueError` if a model cannot be the base of a classifier."""
    adapters = dict.fromkeys(
        name
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for attribute in module.adapter_layer_names
        for name in getattr(module, attribute)
    )
    if adapters or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"The {type(model).__name__} has the adapters {', '.join(adapters)} already, of another classifier or of "
            "get_peft_model; load the CLIP anew, or take them out with unload() of what they belong to."
        )
    if model.config.model_type == "siglip2":
        raise ValueError(
            "Siglip2Model takes images of any size as patches, which a MultiTaskClassifier does not make; give a "
            "checkpoint of SigLIP 2 with a fixed resolution, which is a SiglipModel."
        )

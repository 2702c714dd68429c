"""One forward pass for images of many tasks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..tuner.assemble import AdapterPrompts, Prompts, Route
from ..tuner.context import Overrides
from ..tuner.fingerprint import Fingerprint, autocast_dtype
from .adapters import ClassWeights
from .class_texts import ClassTexts
from .consistency import Consistency, Features
from .images import IGNORE_INDEX
from .output import MultiTaskOutput, mean_by_task, of_trained_classes, task_losses
from .overlap import Overlap
from .processes import is_sharded
from .task import Task
from .task_adapters import TaskAdapters
from .text_features import TextFeatureCache, encode_texts


_overrides: Overrides[Mapping[str, Route]] = Overrides("mmap_peft_tasks")  # what `override_routes` sets, by classifier

RoutedTasks = Mapping[str, tuple[Task, Route]]  # some tasks by name, each with its route
Given = Mapping[str, AdapterPrompts]  # additional prompts that routes may name


class TaskForward(TaskAdapters):
    """The forward pass of a classifier. Base of `MultiTaskClassifier`."""

    text_chunk: int | None
    _text_cache: TextFeatureCache
    _evaluating: Overlap

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        if self.clip.device.type != "meta":
            return self.clip.device
        devices = [getattr(hook, "execution_device", None) for part in self.clip.modules() for hook in _hooks(part)]
        return torch.device(next((device for device in devices if device is not None), "meta"))

    def forward(
        self,
        pixel_values: torch.Tensor,
        task_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        text_features: Mapping[str, torch.Tensor] | None = None,
        given: Given | None = None,
        consistency: Consistency | None = None,
        trained_only: bool | None = None,
    ) -> MultiTaskOutput:
        """Classify images of any tasks in one pass.

        Args:
            pixel_values (`torch.Tensor`): (batch, 3, H, W).
            task_ids (`torch.Tensor`): (batch,), number of each image's task in `tasks`.
            labels (`torch.Tensor`, *optional*): (batch,), number of each image's class; -100 is left out of the loss.
            text_features (`Mapping[str, torch.Tensor]`, *optional*): unit text features of each task's classes, or of
                others, (classes, dim), by task name. `None`: they are computed.
            given (`Mapping[str, AdapterPrompts]`, *optional*): additional prompts that routes may name.
            consistency (`Consistency`, *optional*): losses that are added if there are labels.
            trained_only (`bool`, *optional*): the softmax is over each task's `trained_classes` only: `text_features`
                are those of these, and the logits of other classes -inf. `None`: in training mode.

        Raises:
            ValueError: `task_ids` holds a number that no task has.
        """
        names, rows = self._present(task_ids)
        routed = self._routed(names, trained_only := self.training if trained_only is None else trained_only)
        routes = [route for _, route in routed.values()]
        texts_of_routes = functools.partial(self._text_features, routed, given, text_features)
        weight, bias = self.adapter_set.class_weights(routes, texts_of_routes)
        distinct = list(dict.fromkeys(routes))
        number = torch.tensor([distinct.index(route) for route in routes], device=rows.device)
        image = self.image_features(pixel_values, distinct, number[rows], given)
        all_logits = self.logit_scale() * image.to(weight.dtype) @ weight.T + bias  # of all tasks present
        sizes = [len((text_features or {}).get(name, task.class_names)) for name, (task, _) in routed.items()]
        logits = self._of_own_task(all_logits, sizes, rows, routed if trained_only else None)
        if labels is None:
            return MultiTaskOutput(logits=logits)
        loss = task_losses(logits, labels, task_ids, len(self.tasks)).sum()
        if consistency is None:
            return MultiTaskOutput(loss=loss, logits=logits)
        terms = self._consistency(consistency, routed, rows, Features(weight, image, logits), pixel_values)
        terms = mean_by_task(terms.masked_fill(labels == IGNORE_INDEX, 0), labels, task_ids, len(self.tasks))
        return MultiTaskOutput(loss=loss + terms.sum(), logits=logits, consistency=terms)

    def _consistency(
        self,
        consistency: Consistency,
        routed: RoutedTasks,
        rows: torch.Tensor,
        prompted: Features,
        pixel_values: torch.Tensor,
    ) -> torch.Tensor:
        """The consistency loss of each image, (batch,), where `rows` numbers the tasks of `routed`."""
        sizes = [len(task.class_names) for task, _ in routed.values()]
        some = [name for name, (task, _) in routed.items() if task is not self.tasks[name]]  # of trained classes only
        texts = {name: consistency.frozen_texts[name] for name in routed}
        texts |= {name: texts[name][self.tasks[name].trained_numbers] for name in some}
        frozen = Features(torch.cat(list(texts.values())).to(prompted.texts.device))
        if consistency.uses_images:
            with torch.no_grad(), self.evaluating():
                image = self.image_features(pixel_values, [()], torch.zeros_like(rows))
                logits = self.logit_scale() * image.to(frozen.texts.dtype) @ frozen.texts.T
            logits = self._of_own_task(logits, sizes, rows, routed if some else None)
            frozen = frozen._replace(images=image, logits=logits)
        return consistency.of_each_image(prompted, frozen, sizes, rows)

    def image_features(
        self, pixel_values: torch.Tensor, routes: Sequence[Route], numbers: torch.Tensor, given: Given | None = None
    ) -> torch.Tensor:
        """Unit image features, (batch, dim); `numbers`, (batch,), are those of the images' routes."""
        prompts = self.adapter_set.prompts("vision", routes, given, vision=numbers)
        keywords = {} if prompts is None else {"prompts": prompts}
        return F.normalize(self.clip.get_image_features(pixel_values, **keywords).pooler_output, dim=-1)

    def _present(self, task_ids: torch.Tensor) -> tuple[list[str], torch.Tensor]:
        """Names of the tasks of a batch, and for each row the number of its task among them."""
        present = torch.unique(task_ids).tolist()
        names = [name for number, name in enumerate(self.tasks) if number in present]
        if len(names) < len(present):
            raise ValueError(
                f"task_ids={present} holds a number that no task has; write numbers from 0 to {len(self.tasks) - 1}."
            )
        place = torch.full((len(self.tasks),), -1, device=task_ids.device)
        place[present] = torch.arange(len(present), device=task_ids.device)
        return names, place[task_ids]

    def _of_own_task(
        self, logits: torch.Tensor, sizes: Sequence[int], rows: torch.Tensor, trained: RoutedTasks | None = None
    ) -> torch.Tensor:
        """The logits of each image for its own task's classes, where `rows` numbers tasks with `sizes` classes. With
        `trained`, tasks with the classes that `logits` are of, for those only that are trained."""
        widest = max(*(len(task.class_names) for task in self.tasks.values()), *sizes)
        column = torch.arange(widest, device=rows.device)
        counts = torch.tensor(sizes, device=rows.device)
        starts = counts.cumsum(0) - counts
        of_task = column < counts[rows][:, None]
        columns = torch.where(of_task, starts[rows][:, None] + column, 0)
        logits = logits.gather(1, columns).masked_fill(~of_task, float("-inf"))
        tasks = [self.tasks[name] for name in trained or ()]
        if all(task.trains_all_classes for task in tasks):
            return logits
        return of_trained_classes(logits, tasks, [task.class_names for task, _ in trained.values()], rows)

    def logit_scale(self) -> torch.Tensor:
        """CLIP's inverse temperature."""
        scale = self.clip.logit_scale
        if scale.is_meta:  # offloaded; accelerate loads it in the CLIP's own forward only
            maps = [getattr(hook, "weights_map", None) for hook in _hooks(self.clip)]
            scale = next(weights for weights in maps if weights is not None)["logit_scale"].to(self.device)
        return scale.exp()

    @property
    def current_routes(self) -> Mapping[str, Route]:
        """The route of each task by its name: those of `override_routes`, or else `routes`."""
        return _overrides.get(self) or self.routes

    def _routed(self, names: Sequence[str], trained_only: bool = False) -> RoutedTasks:
        """Tasks with their routes; with `trained_only`, only the texts of classes that are trained are encoded."""
        routes, tasks = self.current_routes, {name: self.tasks[name] for name in names}
        for name, task in tasks.items():
            if trained_only and not task.trains_all_classes and self.adapter_set.uses_texts(routes[name]):
                tasks[name] = task.with_classes(task.trained_classes)
        return {name: (task, routes[name]) for name, task in tasks.items()}

    def class_weights(self, task: str) -> ClassWeights:
        """The linear classifier of a task's unit image features: weight, (classes, dim), and bias, (classes) or 0."""
        routed = self._routed([task])
        return self.adapter_set.class_weights([routed[task][1]], lambda: self._text_features(routed))

    def _text_features(
        self, routed: RoutedTasks, given: Given | None = None, known: Mapping[str, torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Unit text features of each task's classes, (classes, dim): those that are `known`, if any are, or else from
        the cache if nothing has changed."""
        if known:
            return [known[name] for name in routed]
        frozen, of_adapters = self.adapter_set.text_parameters()
        learning = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in (*frozen, *of_adapters))
        random = self.training and getattr(self.clip.config.text_config, "attention_dropout", 0.0) > 0
        # All processes must run a sharded tower together, whichever tasks each of them has.
        changing = learning or random or is_sharded(self)
        if changing:
            self._text_cache.clear()
        if changing or given:
            return self._encode(routed, given)
        state = autocast_dtype(self.device), self.adapter_set.enabled
        keys = {name: (key, state) for name, key in zip(routed, self._text_keys(routed, self.texts))}
        return self._text_cache(
            keys, self._fingerprint(), lambda names: self._encode({name: routed[name] for name in names})
        )

    def _fingerprint(self) -> Fingerprint:
        """Of all that text features depend on."""
        modules = (module for _, module in self.clip.named_modules(memo={self.adapter_set.container}))
        return Fingerprint(*self.adapter_set.text_parameters(), modules)

    def _text_keys(self, routed: RoutedTasks, texts: ClassTexts) -> list[tuple[Route, int]]:
        return [(route, id(texts.of(task, route))) for task, route in routed.values()]

    def text_keys(self, names: Sequence[str], trained_only: bool = False) -> list[tuple[Route, int]]:
        """For each of these tasks a key: its route, and a number of its texts. Tasks with the same key have the same
        text features. `trained_only` as for `encode_texts`."""
        return self._text_keys(self._routed(names, trained_only), self.texts)

    def encode_texts(
        self, names: Sequence[str], given: Given | None = None, trained_only: bool = False
    ) -> list[torch.Tensor]:
        """Unit text features of each of these tasks' classes, with `trained_only` of those that are trained, (classes,
        dim), never from the cache; `given` as for `forward`."""
        return self._encode(self._routed(names, trained_only), given)

    def texts_of(self, task: Task, route: Route) -> torch.Tensor:
        """Unit text features, (classes, dim), of a task that need not be the classifier's, with these adapters."""
        return self._encode({task.name: (task, route)})[0]

    def _encode(
        self,
        routed: RoutedTasks,
        given: Given | None = None,
        texts: ClassTexts | None = None,
        chunk: int | None = None,
    ) -> list[torch.Tensor]:
        texts = texts or self.texts
        keys = self._text_keys(routed, texts)
        distinct = dict(zip(keys, (task for task, _ in routed.values())))
        routes = [route for route, _ in distinct]
        batch = texts.batch(list(distinct.values()), routes)

        def prompts_of(rows: slice) -> Prompts | None:
            numbers = {"text": torch.tensor(batch.tasks[rows]), "classes": torch.tensor(batch.classes[rows])}
            return self.adapter_set.prompts("text", routes, given, **numbers)

        chunk = self.text_chunk or chunk
        features = encode_texts(self.clip, batch, prompts_of, self.device, chunk, not is_sharded(self))
        parts = dict(zip(distinct, features.split([len(task.class_names) for task in distinct.values()])))
        return [parts[key] for key in keys]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the `with` block nothing is in training mode. Several threads may be inside such blocks at once."""
        with self._evaluating.block(self._evaluate):
            yield

    def _evaluate(self, undo: ExitStack) -> None:
        for part in self.modules():
            if part.training:
                undo.callback(setattr, part, "training", True)
        self.eval()

    @contextmanager
    def override_routes(self, routes: Mapping[str, Route]) -> Iterator[None]:
        """Inside the `with` block, in this thread, tasks use these routes: one for every task, by its name."""
        with _overrides.set(self, dict(routes)):
            yield

    @contextmanager
    def zero_shot(self) -> Iterator[None]:
        """Inside the `with` block all tasks use the plain CLIP.

        Prompts are disabled for this thread only, adapters of other methods for all threads.
        """
        with self.override_routes(dict.fromkeys(self.tasks, ())), self.adapter_set.disabled():
            yield

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """As for CLIP: store less for the backward pass and compute more."""
        self.clip.activation_checkpointing_enable(**kwargs)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """The same, by its name in transformers up to 5.20, the last version for Python 3.10."""
        self.clip.gradient_checkpointing_enable(**kwargs)


def check_probabilities(probabilities: torch.Tensor) -> None:
    """Raise a `ValueError` if probabilities are not finite."""
    if not probabilities.isfinite().all():
        raise ValueError(
            "Probabilities are not finite: weights of the base or of the adapters are too large; load them from a "
            "file that is not damaged."
        )


def _hooks(module: nn.Module) -> Sequence[Any]:
    """accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))

"""One forward pass for images of many tasks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..tuner.assemble import AdapterPrompts, Prompts, Route
from ..tuner.context import Overrides
from ..tuner.fingerprint import Fingerprint, autocast_dtype
from .output import MultiTaskOutput, task_losses
from .processes import is_sharded
from .task import Task
from .task_adapters import TaskAdapters
from .text_features import TextFeatureCache, encode_texts


_overrides: Overrides[Mapping[str, Route]] = Overrides("mmap_peft_tasks")  # what `override_routes` sets, by classifier
_evaluating = threading.Lock()


class TaskForward(TaskAdapters):
    """The forward pass of a classifier. Base of `MultiTaskClassifier`."""

    text_chunk: int | None
    _text_cache: TextFeatureCache
    _evaluations = 0  # how many blocks of `evaluating` have begun and not ended
    _in_training: Sequence[nn.Module] = ()  # what was in training mode before the first of them

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        if self.clip.device.type != "meta":
            return self.clip.device
        devices = [getattr(hook, "execution_device", None) for part in self.clip.modules() for hook in _hooks(part)]
        return torch.device(next((device for device in devices if device is not None), "meta"))

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

        Raises:
            ValueError: `task_ids` holds a number that no task has.
        """
        present = torch.unique(task_ids).tolist()
        names = [name for number, name in enumerate(self.tasks) if number in present]
        if len(names) < len(present):
            raise ValueError(
                f"task_ids={present} holds a number that no task has; write numbers from 0 to {len(self.tasks) - 1}."
            )
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
        scale = self.clip.logit_scale
        if scale.is_meta:  # offloaded; accelerate brings it for the CLIP's own forward only
            maps = [getattr(hook, "weights_map", None) for hook in _hooks(self.clip)]
            scale = next(weights for weights in maps if weights is not None)["logit_scale"].to(self.device)
        return scale.exp()

    @property
    def current_routes(self) -> Mapping[str, Route]:
        """The route of each task by its name: those of `override_routes`, or else `routes`."""
        return _overrides.get(self) or self.routes

    def _tasks_and_routes(self, names: Sequence[str]) -> tuple[dict[str, Task], dict[str, Route]]:
        routes = self.current_routes
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
        state = autocast_dtype(self.device), self.adapter_set.enabled
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

    # ---- contexts

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside the `with` block nothing is in training mode; other threads may be inside of one, too."""
        with _evaluating:
            if not self._evaluations:
                self._in_training = [part for part in self.modules() if part.training]
                self.eval()
            self._evaluations += 1
        try:
            yield
        finally:
            with _evaluating:
                self._evaluations -= 1
                if not self._evaluations:
                    for part in self._in_training:
                        part.training = True

    @contextmanager
    def override_routes(self, routes: Mapping[str, Route]) -> Iterator[None]:
        """Inside the `with` block, in this thread, each task uses another route.

        Args:
            routes: the route of every task, by its name.
        """
        with _overrides.set(self, dict(routes)):
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


def _hooks(module: nn.Module) -> Sequence[Any]:
    """accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def _keyword(prompts: Prompts | None) -> dict[str, Prompts]:
    return {} if prompts is None else {"prompts": prompts}

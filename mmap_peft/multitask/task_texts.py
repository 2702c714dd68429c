"""The texts of a classifier's tasks, as features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..tuner.assemble import AdapterPrompts, Prompts, Route
from ..tuner.context import Overrides
from ..tuner.devices import on_host
from ..tuner.fingerprint import Fingerprint, autocast_dtype, compared_by_versions
from .class_texts import ClassTexts, TextBatch
from .processes import is_sharded
from .task import Task
from .task_adapters import TaskAdapters
from .text_chunks import UNKNOWN, texts_at_once, total_memory
from .text_features import TextFeatureCache, encode_texts


_overrides: Overrides[Mapping[str, Route]] = Overrides("mmap_peft_tasks")  # what `override_routes` sets, by classifier

RoutedTasks = Mapping[str, tuple[Task, Route]]  # some tasks by name, each with its route
Given = Mapping[str, AdapterPrompts]  # additional prompts that routes may name


class TaskTexts(TaskAdapters):
    """The routes of a classifier's tasks, and the text features that they give. Base of `MultiTaskClassifier`."""

    text_chunk: int | None
    _text_cache: TextFeatureCache

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        if self.clip.device.type != "meta":
            return self.clip.device
        devices = [getattr(hook, "execution_device", None) for part in self.clip.modules() for hook in hooks_of(part)]
        return torch.device(next((device for device in devices if device is not None), "meta"))

    @property
    def current_routes(self) -> Mapping[str, Route]:
        """The route of each task by its name: those of `override_routes`, or else `routes`."""
        return _overrides.get(self) or self.routes

    def _routed(self, names: Sequence[str], trained_only: bool = False) -> RoutedTasks:
        """Tasks with their routes; with `trained_only`, only the texts of classes that are trained are encoded."""
        routes, tasks = self.current_routes, {name: self.tasks[name] for name in names}
        for name, task in tasks.items():
            if trained_only and not task.trains_all_classes and self.adapter_set.weights_from_texts(routes[name]):
                tasks[name] = task.with_classes(task.trained_classes)
        return {name: (task, routes[name]) for name, task in tasks.items()}

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

    def _fingerprint(self, of_adapters: bool = True) -> Fingerprint:
        """Of all that text features depend on, or those of the plain base."""
        frozen, adapters = self.adapter_set.text_parameters()
        modules = (module for _, module in self.clip.named_modules(memo={self.adapter_set.container}))
        return Fingerprint(frozen, adapters if of_adapters else [], modules)

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
    ) -> list[torch.Tensor]:
        texts = texts or self.texts
        keys = self._text_keys(routed, texts)
        distinct = dict(zip(keys, (task for task, _ in routed.values())))
        routes = [route for route, _ in distinct]
        batch = texts.batch(list(distinct.values()), routes)

        def prompts_of(rows: slice) -> Prompts | None:
            first, last = batch.tasks[rows][0], batch.tasks[rows][-1]
            numbers = {"text": torch.tensor(batch.tasks[rows]) - first, "classes": torch.tensor(batch.classes[rows])}
            return self.adapter_set.prompts("text", routes[first : last + 1], given, **numbers)

        # Processes that run a sharded tower together may have different tasks, but need the same number of chunks.
        whole = is_sharded(self) or torch.compiler.is_compiling()
        chunk = self.text_chunk if whole else self._texts_at_once(batch)
        features = encode_texts(self.clip, batch, prompts_of, self.device, chunk, not is_sharded(self))
        parts = dict(zip(distinct, features.split([len(task.class_names) for task in distinct.values()])))
        return [parts[key] for key in keys]

    def _texts_at_once(self, batch: TextBatch) -> int:
        """`text_chunk`, or the number that is chosen for a batch; the same on all processes if they share a tower."""
        if self.text_chunk is not None:
            return self.text_chunk
        total = UNKNOWN if is_sharded(self) else total_memory(self.device)
        return texts_at_once(self.clip.config.text_config, batch.ids.shape[1], self.clip.dtype.itemsize, total)

    @contextmanager
    def many_passes(self) -> Iterator[None]:
        """Inside the `with` block, which is for many forward passes in a row, a GPU is not waited for to see whether
        parameters have changed: their version counters are compared, and what was kept before is computed anew."""
        if not on_host(self.device):
            self._text_cache.clear()
            self.texts.forget_batch()
        with compared_by_versions():
            yield

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


def hooks_of(module: nn.Module) -> Sequence[Any]:
    """accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))

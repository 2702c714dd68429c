"""One forward pass for images of many tasks."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from ..tuner.assemble import Route
from ..tuner.devices import on_device
from ..tuner.images import ImageStates, image_features
from .adapters import ClassWeights, TextFeatures
from .consistency import Consistency, Features
from .output import MultiTaskOutput, mean_by_task, of_trained_classes, task_losses
from .overlap import Overlap
from .task_texts import Given, RoutedTasks, TaskTexts, hooks_of


class TaskForward(TaskTexts):
    """The forward pass of a classifier. Base of `MultiTaskClassifier`."""

    _evaluating: Overlap

    def forward(
        self,
        pixel_values: torch.Tensor | ImageStates,
        task_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        text_features: Mapping[str, torch.Tensor] | None = None,
        given: Given | None = None,
        consistency: Consistency | None = None,
        trained_only: bool | None = None,
        others: Collection[str] = (),
        task_counts: Sequence[int] | None = None,
    ) -> MultiTaskOutput:
        """Classify images of any tasks in one pass. A number in `task_ids` that no task has raises a `ValueError`.

        Args:
            pixel_values (`torch.Tensor` or `ImageStates`): (batch, 3, H, W), or what enters a layer of the tower.
            task_ids (`torch.Tensor`): (batch,), number of each image's task in `tasks`.
            labels (`torch.Tensor`, *optional*): (batch,), number of each image's class; -100 is left out of the loss.
            text_features (`Mapping[str, torch.Tensor]`, *optional*): unit text features of each task's classes, or of
                others, (classes, dim), by task name. `None`: they are computed.
            given (`Mapping[str, AdapterPrompts]`, *optional*): additional prompts that routes may name.
            consistency (`Consistency`, *optional*): losses that are added if there are labels.
            others (`Collection[str]`): names of the tasks whose `text_features` are of other classes than their own.
            trained_only (`bool`, *optional*): over the `trained_classes` only: `text_features` are of these, and the
                logits of others -inf. `None`: in training mode.
            task_counts (`Sequence[int]`, *optional*): number of images of each task in `task_ids`, (tasks,). `None`:
                it is read from `task_ids`, which waits for a GPU.
        """
        names, rows, counts = self._present(task_ids, task_counts)
        routed = self._routed(names, trained_only := self.training if trained_only is None else trained_only)
        texts = functools.cache(functools.partial(self._text_features, routed, given, text_features))
        weights = self._class_weights(routed, texts, others)
        image = self._images_of(routed, rows, pixel_values, given, counts)
        sizes = [len((text_features or {}).get(name, task.class_names)) for name, (task, _) in routed.items()]
        logits = self._logits(routed, rows, counts, image, weights, sizes, trained_only, others)
        if labels is None:
            return MultiTaskOutput(logits=logits)
        loss = task_losses(logits, labels, task_ids, len(self.tasks)).sum()
        if consistency is None:
            return MultiTaskOutput(loss=loss, logits=logits)
        prompted = Features(torch.cat(self._trained_rows(routed, texts(), trained_only)), image, logits)
        terms = self._consistency(consistency, routed, rows, prompted, pixel_values, trained_only)
        terms = mean_by_task(terms, labels, task_ids, len(self.tasks))
        return MultiTaskOutput(loss=loss + terms.sum(), logits=logits, consistency=terms)

    def _logits(
        self,
        routed: RoutedTasks,
        rows: torch.Tensor,
        counts: Sequence[int],
        image: torch.Tensor,
        weights: ClassWeights,
        sizes: Sequence[int],
        trained_only: bool,
        others: Collection[str],
    ) -> torch.Tensor:
        """The logits of each image for its own task's classes, of which there are `sizes`, by its unit feature."""
        weight, bias = weights
        all_logits = self.logit_scale() * image.to(weight.dtype) @ weight.T + bias  # of all tasks present
        logits = self._of_own_task(all_logits, sizes, rows, routed if trained_only else None)
        routes = [() if name in others else route for name, (_, route) in routed.items()]
        added = self.adapter_set.added_logits(image, routes, rows, counts, logits.shape[1])
        return logits if added is None else logits + added

    def _consistency(
        self,
        consistency: Consistency,
        routed: RoutedTasks,
        rows: torch.Tensor,
        prompted: Features,
        pixel_values: torch.Tensor | ImageStates,
        trained_only: bool,
    ) -> torch.Tensor:
        """The consistency loss of each image, (batch,), where `rows` numbers the tasks of `routed`."""
        texts = self._trained_rows(routed, [consistency.frozen_texts[name] for name in routed], trained_only)
        sizes, frozen = list(map(len, texts)), Features(torch.cat(texts).to(prompted.texts.device))
        if consistency.uses_images:
            with torch.no_grad(), self.evaluating():
                image = self.image_features(pixel_values, [()], torch.zeros_like(rows))
                logits = self.logit_scale() * image.to(frozen.texts.dtype) @ frozen.texts.T
            trained = {name: (self.tasks[name].with_classes(self.tasks[name].trained_classes), ()) for name in routed}
            logits = self._of_own_task(logits, sizes, rows, trained if trained_only else None)
            frozen = frozen._replace(images=image, logits=logits)
        return consistency.of_each_image(prompted, frozen, sizes, rows)

    def _trained_rows(
        self, names: Iterable[str], features: Sequence[torch.Tensor], trained_only: bool
    ) -> list[torch.Tensor]:
        """The text features of each task, with `trained_only` of the classes that are trained."""
        if not trained_only:
            return list(features)
        kept = [self.tasks[name].trained_numbers for name in names]
        return [
            part if len(part) == len(rows) else part[on_device(rows, part.device)]
            for part, rows in zip(features, kept)
        ]

    def _images_of(
        self,
        routed: RoutedTasks,
        rows: torch.Tensor,
        pixel_values: torch.Tensor | ImageStates,
        given: Given | None,
        task_counts: Sequence[int],
    ) -> torch.Tensor:
        """Unit features of images, where `rows` numbers their tasks, each of which has so many of them."""
        counts: dict[Route, int] = {}
        for (_, route), count in zip(routed.values(), task_counts):
            counts[route] = counts.get(route, 0) + count
        distinct = {route: number for number, route in enumerate(counts)}
        numbers = on_device([distinct[route] for _, route in routed.values()], rows.device)
        return self.image_features(pixel_values, list(counts), numbers[rows], given, list(counts.values()))

    def image_features(
        self,
        pixel_values: torch.Tensor | ImageStates,
        routes: Sequence[Route],
        numbers: torch.Tensor,
        given: Given | None = None,
        counts: Sequence[int] = (),
    ) -> torch.Tensor:
        """Unit image features, (batch, dim); `numbers`, (batch,), are those of the images' routes. Of several routes,
        `counts` says how many images each has."""
        prompts = self.adapter_set.prompts("vision", routes, given, vision=numbers)
        pooled = image_features(self.clip, pixel_values, prompts)
        return F.normalize(self.adapter_set.image_features(pooled, routes, numbers, counts), dim=-1)

    def _present(
        self, task_ids: torch.Tensor, task_counts: Sequence[int] | None
    ) -> tuple[list[str], torch.Tensor, list[int]]:
        """Names of the tasks of a batch, for each row the number of its task among them, and their images' numbers."""
        counts = Counter(task_ids.tolist()) if task_counts is None else dict(enumerate(task_counts))
        present = sorted(number for number, count in counts.items() if count)
        names = list(self.tasks)
        if present and not 0 <= present[0] <= present[-1] < len(names):
            raise ValueError(
                f"task_ids={present} holds a number that no task has; write numbers from 0 to {len(names) - 1}."
            )
        place = [present.index(number) if number in present else -1 for number in range(len(names))]
        rows = on_device(place, task_ids.device)[task_ids]
        return [names[number] for number in present], rows, [counts[number] for number in present]

    def _of_own_task(
        self, logits: torch.Tensor, sizes: Sequence[int], rows: torch.Tensor, trained: RoutedTasks | None = None
    ) -> torch.Tensor:
        """The logits of each image for its own task's classes, where `rows` numbers tasks with `sizes` classes. With
        `trained`, tasks with the classes that `logits` are of, for those only that are trained."""
        widest = max(*(len(task.class_names) for task in self.tasks.values()), *sizes)
        column = torch.arange(widest, device=rows.device)
        counts = on_device(sizes, rows.device)
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
            maps = [getattr(hook, "weights_map", None) for hook in hooks_of(self.clip)]
            scale = next(weights for weights in maps if weights is not None)["logit_scale"].to(self.device)
        return scale.exp()

    def class_weights(self, task: str) -> ClassWeights:
        """The linear classifier of a task's unit image features: weight, (classes, dim), and bias, (classes) or 0."""
        routed = self._routed([task])
        return self._class_weights(routed, lambda: self._text_features(routed))

    def _class_weights(self, routed: RoutedTasks, texts: TextFeatures, others: Collection[str] = ()) -> ClassWeights:
        """The linear classifiers of several tasks, of which `others` have text features of other classes."""
        adapters, routes = self.adapter_set, [route for _, route in routed.values()]
        if not others:
            return adapters.class_weights(routes, texts)
        parts = []
        for number, name in enumerate(routed):
            weights = adapters.other_class_weights if name in others else adapters.class_weights
            weight, bias = weights([routes[number]], lambda number=number: [texts()[number]])
            parts.append((weight, weight.new_zeros(len(weight)) + bias))
        return torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])

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

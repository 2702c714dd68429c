"""Caches of the tasks' training images, for Tip-Adapter: how they are filled, and how their scales are chosen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import MinLen

from ..checking import Count, checked
from ..methods.tip_adapter import Alpha, Beta, TipAdapter, TipAdapterConfig
from .images import TaskImages
from .prototypes import PrototypeRouting, check_features


# The values that the authors' code searches for ImageNet: 20 of alpha and 200 of beta.
ALPHAS = tuple(0.1 + number * (3 - 0.1) / 20 for number in range(20))
BETAS = tuple(0.1 + number * (7 - 0.1) / 200 for number in range(200))
AT_ONCE = 2**24  # cosines that are in memory at a time


class CacheScales(NamedTuple):
    """The scales of a task's cache, and its accuracy with them on the images that they were chosen on, 0 to 1."""

    alpha: float
    beta: float
    accuracy: float


class TaskCaches(PrototypeRouting):
    """Fills the caches of tasks. Base of `MultiTaskClassifier`."""

    def fill_caches(self, batch_size: int = 64, unreadable: str = "refuse") -> None:
        """Fill the cache of each task with the features of its training images, for `TipAdapterConfig`. What a cache
        held is replaced; tasks whose training images are not given keep theirs. Images of classes that are not among a
        task's `classes_for_training` are left out.

        Args:
            batch_size (`int`): number of images that are computed at a time.
            unreadable (`str`): what to do with a file that is no image, `"refuse"` or `"skip"`, as for training.

        Raises:
            ValueError: another method, a task that has neither training images nor a filled cache, or an image that
                cannot be read. Nothing has changed then.
        """
        checked(batch_size, Count, "batch_size")
        self._check_caches()
        given = [name for name, task in self.tasks.items() if task.train is not None and len(task.train)]
        for name, task in self.tasks.items():
            if name in given or self._cache(name).is_empty:
                task.check_training_images()
        processor = self.processor.image_processor
        self._fill(TaskImages(self.tasks.values(), "train", processor, unreadable, given, 0), given, batch_size)

    def fill_empty_caches(self, images: TaskImages, batch_size: int) -> None:
        """As `fill_caches`, of the tasks whose cache is empty, with their images among those given."""
        empty = set(self.adapter_set.empty_caches)
        self._fill(images, [name for name, route in self.routes.items() if empty & set(route)], batch_size)

    @torch.no_grad()
    def _fill(self, images: TaskImages, names: Collection[str], batch_size: int) -> None:
        rows = [
            row
            for number, name in enumerate(self.tasks)
            if name in names
            for row in range(images.starts[number], images.starts[number + 1])
        ]
        features, labels, numbers = self._read(images, batch_size, "Caches", rows)
        chosen = {name: numbers == number for number, name in enumerate(self.tasks) if name in names}
        for name, own in chosen.items():
            check_features(name, features[own])
        for name, own in chosen.items():
            self._cache(name).fill(features[own], labels[own])
            self.trained_adapters.update(self.routes[name])
        self.record.prompted = {}  # of other caches

    @torch.no_grad()
    def choose_cache_scales(
        self,
        images: Mapping[str, Any],
        alphas: Sequence[float] = ALPHAS,
        betas: Sequence[float] = BETAS,
        batch_size: int = 64,
    ) -> dict[str, CacheScales]:
        """Give the caches of tasks the `alpha` and `beta` with the highest accuracy on images; of equals, the first
        beta, and for it the first alpha. Keys of Tip-Adapter-F stay as they were trained.

        They must be validation images: if they are the test images, their accuracy says nothing about other images any
        more.

        Args:
            images (`Mapping[str, Any]`): for each of these tasks, by its name, images with labels, as the `eval` of a
                `Task`.
            alphas, betas (`Sequence[float]`): values to choose from. The defaults are those of the authors' code for
                ImageNet.
            batch_size (`int`): number of images that are computed at a time.

        Raises:
            ValueError: another method, no such task, a cache that is empty, or images that cannot be read. Nothing has
                changed then.
        """
        self._check_caches()
        for value, kind, name in (alphas, Alpha, "alphas"), (betas, Beta, "betas"):
            checked(list(value), Annotated[list[kind], MinLen(1)], name)
        checked(batch_size, Count, "batch_size")
        for name in images:
            self._check_filled(name)
        tasks = [replace(task, train=None, eval=images.get(name)) for name, task in self.tasks.items()]
        data = TaskImages(tasks, "eval", self.processor.image_processor, only=list(images), cache_bytes=0)
        features, labels, numbers = self._read(data, batch_size, "Scales")
        found = {}
        for number, name in enumerate(self.tasks):
            if name in images:
                check_features(name, features[numbers == number])
                own = (each[numbers == number].to(self.device) for each in (features, labels))
                found[name] = self._best_scales(name, *own, alphas, betas)
        for name, scales in found.items():
            self._cache(name).alpha.fill_(scales.alpha)
            self._cache(name).beta.fill_(scales.beta)
        self.record.prompted = {}  # of other scales
        return found

    def _best_scales(
        self, name: str, features: torch.Tensor, labels: torch.Tensor, alphas: Sequence[float], betas: Sequence[float]
    ) -> CacheScales:
        cache, correct = self._cache(name), torch.zeros(len(betas), len(alphas), dtype=torch.long)
        with self.evaluating():
            weight, bias = self.class_weights(name)
        logits = self.logit_scale().float() * features @ weight.float().T + bias
        for rows in torch.arange(len(features)).split(max(1, AT_ONCE // cache.keys[..., 0].numel())):
            cosines = cache.cosines(features[rows])
            for i, beta in enumerate(betas):
                sums = cache.sums(cosines, beta)
                for j, alpha in enumerate(alphas):
                    correct[i, j] += (logits[rows] + alpha * sums).argmax(-1).eq(labels[rows]).sum().cpu()
        best, alpha = divmod(int(correct.flatten().argmax()), len(alphas))
        return CacheScales(alphas[alpha], betas[best], correct.max().item() / len(labels))

    def _check_filled(self, name: str) -> None:
        self.check_task(name)
        if self._cache(name).is_empty:
            raise ValueError(f"The cache of task {name!r} is empty; call fill_caches() or train first.")

    def _cache(self, name: str) -> TipAdapter:
        return self.adapter_set.part(self.routes[name])

    def _check_caches(self) -> None:
        if not isinstance(self.adapter_config, TipAdapterConfig):
            method = "zero-shot" if self.adapter_config is None else type(self.adapter_config).__name__
            raise ValueError(
                f"Only TipAdapterConfig has caches of training images, but the classifier is one of {method}; give it "
                "TipAdapterConfig()."
            )

"""A trainer that computes what is the same for an image at every step only once."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..tuner.fingerprint import Fingerprint, autocast_dtype
from ..tuner.images import ImageStates, constant_parameters, first_changed_layer, image_states
from .augmented_steps import AugmentingTrainer
from .feature_cache import CachedImages, FeatureCache, collate_features, features_name
from .images import TaskImages, collate
from .pictures import Pictures
from .processes import is_sharded
from .row_files import RowFiles
from .training_pictures import TrainingPictures


logger = logging.get_logger(__name__)


class CachingTrainer(AugmentingTrainer):
    """Keeps the states of images that enter the first layer which adapters change, as `args.cache_features` says.

    Training, evaluation and the gradients that compare tasks read them. Images whose states are kept are not decoded.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._features: FeatureCache | None = None
        self._opened: dict[str, FeatureCache] = {}  # by name: a loader may go on with an earlier one
        self._features_of: tuple[Any, ...] = ()  # what the cache was made for

    def feature_cache(self) -> FeatureCache | None:
        """The cache for the model as it is now; `None` if there is none.

        Raises:
            ValueError: `cache_features="always"` was asked for where it is impossible.
        """
        layer, always = first_changed_layer(self.model.clip), self.args.cache_features == "always"
        reason = self._reason_against(layer)
        if reason is not None:
            if always:
                raise ValueError(f"Invalid value 'always' for `cache_features`: expected 'auto', since {reason}.")
            self._features, self._features_of = None, ()
            return None
        with self.accelerator.autocast():
            dtype = autocast_dtype(self.args.device)
            state = layer, dtype, Fingerprint(constant_parameters(self.model.clip, layer))
            if state != self._features_of:
                self._features, self._features_of = self._open(layer), state
        if self._features is None and always:
            raise ValueError(
                "Invalid value 'always' for `cache_features`: expected 'auto', since the weights are quantised or "
                "the image processor cannot tell its settings."
            )
        return self._features

    def _reason_against(self, layer: int) -> str | None:
        """Why nothing is kept, if adapters change the image tower from this layer on."""
        args = self.args
        if args.cache_features == "never" or not args.image_cache_gb:
            return "there is no space for it; write image_cache_gb=4.0, say"
        if not layer:
            return (
                "adapters change the first layer of the image tower or what comes before it, or the tower cannot be "
                "run from a layer on, is random, offloaded, or has hooks of others"
            )
        if not hasattr(os, "preadv"):
            return "this system cannot read at a place of a file"
        if is_sharded(self.model) or self.is_deepspeed_enabled:
            return "processes share the weights of the image tower (FSDP, DeepSpeed)"
        if not self._collates_itself or args.accelerator_config.dispatch_batches:
            return "a data_collator of yours or dispatch_batches needs the pixels"
        if "inputs" in args.include_for_metrics:
            return "include_for_metrics needs the pixels"
        small = layer >= len(self.model.clip.vision_model.encoder.layers)  # one token of an image
        if args.cache_features == "auto" and not small and args.device.type != "cpu":
            return "an accelerator computes it faster than it is read"
        return None

    @property
    def _collates_itself(self) -> bool:
        collator = self.data_collator
        return getattr(collator, "keywords", {}).get("collate", collator) in (None, collate)  # None: of `Pictures`

    def _open(self, layer: int) -> FeatureCache | None:
        clip, args = self.model.clip, self.args
        processor = self.model.processor.image_processor
        pixels = processor(images=Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
        with torch.no_grad(), self.model.evaluating():
            states = image_states(clip, pixels.to(args.device), layer)[0]
        stored = args.stored_dtype or states.dtype
        name = features_name(clip, processor, layer, args.device, stored)
        if name is None:
            return None
        size, most = stored.itemsize * states.numel(), args.image_cache_gb * 1e9
        needed = size * sum(self._visits(data) for data in (self.train_dataset, self.eval_dataset))
        files = RowFiles(name, size, most, needed)
        if needed > files.most_bytes:
            logger.warning(
                f"The features of {needed // size} images need {needed / 1e9:.2g} GB, of which image_cache_gb and the "
                f"disk allow {files.most_bytes / 1e9:.2g}; those of the other images are computed at each epoch."
            )
        for data in (self.train_dataset, self.eval_dataset):
            if isinstance(data, TaskImages):
                data.limit_cache(max(0.0, most - needed))
        cache = self._opened[name] = FeatureCache(name, layer, files, tuple(states.shape), states.dtype, stored)
        return cache

    def _visits(self, data: Any) -> int:
        """How many different images a data set has, with the views of training images."""
        views = getattr(self.args.augmentation, "views", None) or 1
        return len(data) * (views if data is self.train_dataset else 1) if isinstance(data, TaskImages) else 0

    # ---- batches

    def cached(self, images: Any) -> CachedImages | None:
        """Images with the states that are kept; `None` if there are none to be kept."""
        random = isinstance(images, TrainingPictures) and images.augmentation.views is None
        if random and self.args.cache_features == "always":
            raise ValueError(
                "Invalid value 'always' for `cache_features`: expected 'auto', since each epoch augments images in "
                "another way; or write augment_views=4, say."
            )
        if random or not isinstance(images, TaskImages | Pictures):
            return None
        cache = self.feature_cache()
        return None if cache is None else CachedImages(images, cache)

    def get_train_dataloader(self) -> DataLoader:
        self.feature_cache()  # it limits the caches of images, which are made next
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        before = self._features
        if self.feature_cache() is not before and hasattr(self, "_eval_dataloaders"):
            del self._eval_dataloaders  # workers that stay would go on with the cache before
        return super().get_eval_dataloader(eval_dataset)

    def _get_dataloader(self, dataset: Dataset, *args: Any, **kwargs: Any) -> DataLoader:
        images, collator = self.cached(dataset), self.data_collator
        if images is None:
            return super()._get_dataloader(dataset, *args, **kwargs)
        try:
            self.data_collator = functools.partial(collate_features, name=images.cache.name, collate=collator)
            return super()._get_dataloader(images, *args, **kwargs)
        finally:
            self.data_collator = collator

    def image_batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """The model's inputs of some images of `train_dataset`, which are not augmented."""
        images, collator = self.train_dataset, self.data_collator
        cached = self.cached(images)
        if cached is not None:
            images, collator = cached, functools.partial(collate_features, name=cached.cache.name, collate=collator)
        return self._prepare_inputs(collator([images[int(row)] for row in rows]))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        return self._with_states(**inputs) if "known" in inputs else inputs

    def _with_states(
        self,
        name: str,
        known: list[int],
        keys: list[bytes | None],
        states: torch.Tensor | None = None,
        missing: dict[str, Any] | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        """The model's inputs of what `collate_features` returned; what is `missing` is computed and kept."""
        cache, count = self._opened[name], len(inputs["labels"])
        if missing is not None:
            pixels = self.model_inputs(missing)["pixel_values"]
            with self.model.evaluating(), self.accelerator.autocast():
                fresh = cache.compute(self.model.clip, pixels, keys, count)
            if states is not None:
                others = [number for number in range(count) if number not in set(known)]
                order = torch.tensor([*known, *others]).argsort().to(fresh.device)
                fresh = torch.cat([states, fresh])[order]
            states = fresh
        return {"pixel_values": ImageStates(cache.layer, states), **inputs}

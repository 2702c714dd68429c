"""A trainer whose images are transferred as bytes, and augmented in training steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .checkpoints import ClassifierTrainer
from .images import TaskImages, collate
from .pictures import Pictures, model_inputs
from .sampler import TaskSampler
from .training_pictures import TrainingPictures, VisitSampler


class AugmentingTrainer(ClassifierTrainer):
    """Transfers images to the device as bytes, with labels and numbers of tasks in one piece, and normalizes them
    there. Augments those of training steps, as `args.augment` says.

    Images whose processor does not separate resizing and normalization are transferred as floats, as are those of a
    user's own `data_collator`, which may expect `pixel_values`, with `dispatch_batches`, which splits batches, and
    with `include_for_metrics=["inputs"]`, which hands them to metrics.

    Everything else reads images from `train_dataset` and `eval_dataset`, which are never augmented: evaluation,
    gradients that compare tasks, prototypes.

    Raises:
        ValueError: images cannot be augmented, since the image processor does not separate resizing and normalisation.
    """

    def __init__(self, **kwargs: Any) -> None:
        args = kwargs["args"]
        args.accelerator_config.non_blocking |= args.dataloader_pin_memory  # copied while the GPU computes
        super().__init__(**kwargs)
        if self.train_dataset is not None:
            self.training_pictures()  # raises early

    @property
    def order_seed(self) -> int:
        """Seed of the images' order and of their augmentation."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @property
    def sampler_class(self) -> type[TaskSampler]:
        """Class of the sampler of training steps."""
        return TaskSampler if self.args.augmentation is None else VisitSampler

    def augmentation_state(self) -> dict[str, str]:
        """What `multitask_state.json` holds of the augmentation; nothing if there is none."""
        augmentation = self.args.augmentation
        return {} if augmentation is None else {"augment": str(augmentation)}

    def training_pictures(self) -> TrainingPictures | None:
        """The images of training steps before they are augmented; `None` without augmentation."""
        augmentation = self.args.augmentation
        return None if augmentation is None else TrainingPictures(self.train_dataset, augmentation, self.order_seed)

    # ---- batches

    def get_train_dataloader(self) -> DataLoader:
        pictures = self.training_pictures() or self._as_pictures(self.train_dataset)
        with self._reading(pictures, train_dataset=pictures):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        named = isinstance(eval_dataset, str)
        images = self.eval_dataset if eval_dataset is None else eval_dataset
        pictures = self._as_pictures(self.eval_dataset[eval_dataset] if named else images)
        with self._reading(pictures, eval_dataset={eval_dataset: pictures} if named else pictures):
            return super().get_eval_dataloader(eval_dataset if named else None)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        pictures = self._as_pictures(test_dataset)
        with self._reading(pictures):
            return super().get_test_dataloader(pictures)

    def _as_pictures(self, images: Any) -> Any:
        """Images as `Pictures`, if they can be bytes and nobody expects `pixel_values`."""
        shape = images.preprocessing.shape if isinstance(images, TaskImages) else None
        if shape is None or len(shape) != 3 or self.data_collator is not collate:
            return images
        needs_floats = self.args.accelerator_config.dispatch_batches or "inputs" in self.args.include_for_metrics
        return images if needs_floats else Pictures(images)

    @contextmanager
    def _reading(self, pictures: Any, **attributes: Any) -> Iterator[None]:
        """Inside the `with` block, the trainer has other attributes, and collates batches of `Pictures`."""
        if isinstance(pictures, Pictures):
            own = None if self.data_collator is collate else self.data_collator
            attributes["data_collator"] = functools.partial(pictures.collate, collate=own)
        before = {name: getattr(self, name) for name in attributes}
        try:
            vars(self).update(attributes)
            yield
        finally:
            vars(self).update(before)

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch for the model, with `pixel_values`: see `pictures.model_inputs`."""
        return model_inputs(batch, self.args.device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().training_step(model, self.model_inputs(inputs), *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self.model_inputs(inputs), *args, **kwargs)

"""A trainer whose training steps see augmented images."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .augmentation import apply
from .checkpoints import ClassifierTrainer
from .sampler import TaskSampler
from .training_pictures import TrainingPictures, VisitSampler, collate_pictures


class AugmentingTrainer(ClassifierTrainer):
    """Augments the images of training steps, on the device that trains, as `args.augment` says.

    Everything else reads images from `train_dataset` and `eval_dataset`, which are never augmented: evaluation,
    gradients that compare tasks, prototypes.

    Raises:
        ValueError: images cannot be augmented, since the image processor does not separate resizing and normalisation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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

    def get_train_dataloader(self) -> DataLoader:
        pictures = self.training_pictures()
        if pictures is None:
            return super().get_train_dataloader()
        images, collate = self.train_dataset, self.data_collator
        try:
            self.train_dataset, self.data_collator = pictures, functools.partial(collate_pictures, collate=collate)
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = images, collate

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if "changes" in inputs:
            inputs = self.augmented(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def augmented(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """A batch for the model: with `pixel_values` of the changed images in place of `pictures` and `changes`.

        Normalised are the changed images, each byte as the image processor normalises it.
        """
        preprocessing = self.train_dataset.preprocessing
        rest = {name: value for name, value in batch.items() if name not in ("pictures", "changes")}
        images = apply(batch["changes"], batch["pictures"].to(self.args.device), preprocessing.shape[1:])
        table = torch.from_numpy(preprocessing.table).to(images.device)
        pixels = [values[channel.long()] for values, channel in zip(table, images.unbind(1))]
        return {"pixel_values": torch.stack(pixels, dim=1), **rest}

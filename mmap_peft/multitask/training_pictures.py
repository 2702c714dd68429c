"""Training images as bytes, with the random changes that are drawn for each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from .augmentation import Augmentation
from .images import TaskImages
from .pictures import Pictures
from .sampler import TaskSampler


LARGER = 2  # sides of a picture that crops are taken from, over those of the model's input
_SIZE_BYTES = 8  # width and height, 4 bytes each


class VisitSampler(TaskSampler):
    """A `TaskSampler` whose elements are image, visit and epoch.

    Images of small tasks come several times in an epoch. Their visits are numbered from 0, so that each is changed in
    another way.
    """

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        visits: Counter[int] = Counter()
        for row in super().__iter__():
            yield row, visits[row], self.epoch
            visits[row] += 1


class TrainingPictures(Pictures):
    """The images of a `TaskImages` before they are augmented, numbered by what a `VisitSampler` yields.

    Without crops, a picture is what the image processor resizes. With crops it is the whole picture, squashed to twice
    the height and width of the model's input. A square has one shape for all pictures, as caches and batches need, and
    the real ratio of the sides is kept for the crops' geometry. Twice the side is ours: of bytes, this is as large as
    the `pixel_values` of 32 bits; docs/data.md has the differences from crops of the original pictures.

    Args:
        images (`TaskImages`): the images, whose caches are used.
        augmentation (`Augmentation`), seed (`int`): what is drawn.

    Raises:
        ValueError: the image processor cannot run in two steps.
    """

    def __init__(self, images: TaskImages, augmentation: Augmentation, seed: int) -> None:
        super().__init__(images)
        self.augmentation, self.seed = augmentation, seed
        processor, shape = images.preprocessing, self.shape
        if shape is None or len(shape) != 3:
            raise ValueError(
                f"augment={'+'.join(augmentation.parts)!r} cannot be used, since images are changed between resizing "
                f"and normalisation, which {type(processor.image_processor).__name__} does not separate; write "
                "augment='none'."
            )
        self.size = shape[1:]
        self._resize, self._crops = processor.resize, "crop" in augmentation.parts
        if self._crops:
            self.shape = shape[0], LARGER * shape[1], LARGER * shape[2]
            self._resize = self._squash
        self._cache = images.cache((int(np.prod(self.shape)) + _SIZE_BYTES,) if self._crops else shape)

    def __getitem__(self, place: tuple[int, int, int]) -> dict[str, Any]:
        row, visit, epoch = place
        found, _, item = self.images.read(row, self._resize, self._cache)
        aspect = 1.0
        if self._crops:
            width, height = found[-_SIZE_BYTES:].view("<u4")
            found, aspect = found[:-_SIZE_BYTES].reshape(self.shape), float(width / height)
        changes = self.augmentation.draw(self.seed, epoch, row, visit, aspect)
        return {**item, "pictures": found, "changes": changes}

    def view(self, place: tuple[int, int, int]) -> str:
        """All but the picture itself that the changes of an image depend on."""
        row, visit, epoch = place
        return f"{self.augmentation} {self.seed} {row} {self.augmentation.view(epoch, visit)}"

    def _squash(self, image: Image.Image) -> np.ndarray:
        """A whole picture as bytes, followed by its width and height."""
        pixels = np.asarray(image.resize(self.shape[:0:-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        return np.concatenate([pixels.ravel(), np.array(image.size, "<u4").view(np.uint8)])

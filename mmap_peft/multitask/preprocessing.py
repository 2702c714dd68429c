"""Running an image processor in two steps, so that resized images can be kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image


class Preprocessing:
    """Runs an image processor in one call, or in two steps with exactly the same result.

    `resize` resizes and crops to bytes, which need a quarter of the memory of `pixel_values`. `normalise` looks up the
    processor's output for each byte in a table, which is faster than the processor. Both ways are compared on two
    images; if they differ, images cannot be processed in two steps.

    Attributes:
        shape (`tuple[int, ...]` or `None`): shape of what `resize` returns, (channels, height, width); `None` if the
            processor cannot be run in two steps.
        table (`np.ndarray`): (3, 256), the processor's output for each byte of each channel.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor, self.shape = image_processor, None
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((60, 40), (50, 90))]
        try:
            self.shape = self._resize(images[0]).shape
            every_value = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (3, 1, 1))
            no_resizing = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
            self.table = self._pixels(every_value, "pt", **no_resizing).reshape(3, 256).numpy()
            if not all(torch.equal(self.normalise(self.resize(image)), self(image)) for image in images):
                self.shape = None
        except Exception:  # processors without these options raise different exceptions
            self.shape = None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """The processor's `pixel_values` of one image."""
        return self._pixels(image, "pt")

    def resize(self, image: Image.Image) -> np.ndarray | None:
        """The image resized and cropped, of `shape`, uint8; `None` if it cannot be normalised by itself."""
        if self.shape is None:
            return None
        resized = self._resize(image)
        return resized if resized.shape == self.shape and resized.dtype == np.uint8 else None

    def normalise(self, resized: np.ndarray) -> torch.Tensor:
        """The `pixel_values` of what `resize` returned."""
        return torch.from_numpy(np.stack([table.take(channel) for table, channel in zip(self.table, resized)]))

    def _resize(self, image: Image.Image) -> np.ndarray:
        return np.asarray(self._pixels(image, "np", do_rescale=False, do_normalize=False))

    def _pixels(self, image: Any, kind: str, **switches: Any) -> Any:
        return self.image_processor(images=image, return_tensors=kind, **switches)["pixel_values"][0]

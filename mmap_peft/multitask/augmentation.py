"""Random crops, flips and colours of training images: the settings, how they are drawn, and how they are applied."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F
from transformers.hf_argparser import HfArg

from ..checking import Count, checked, shortened
from .colours import change_colours


PARTS = ("crop", "flip", "jitter")
RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height, as in torchvision
ATTEMPTS = 10  # to draw a crop that lies inside the picture, as in torchvision
NUMBERS = 2 * ATTEMPTS + 2 + 1 + 5  # that are drawn for an image: of crop, flip and jitter
WHOLE = (0.0, 0.0, 1.0, 1.0)
ORDERS = list(itertools.permutations(range(4)))  # of the four changes of colour


@dataclass
class AugmentationArguments:
    """The arguments of augmentation. Base of `MultiTaskTrainingArguments`."""

    augment: str = HfArg(
        default="none",
        help="How training images are changed at random: 'none', or parts joined by '+', such as 'crop+flip'. 'crop': "
        "a random part of the picture; 'flip': mirrored with probability 0.5; 'jitter': other colours. Not for images "
        "with a left and a right, such as letters. Stage 1 compares tasks by unchanged images.",
    )
    augment_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={
            "help": "Smallest and largest area of a crop, as shares of the picture. Width to height is 3/4 to 4/3."
        },
    )
    augment_jitter: list[float] = field(
        default_factory=lambda: [0.4, 0.4, 0.4, 0.1],
        metadata={
            "help": "Largest change of brightness, contrast and saturation (0.4: factors from 0.6 to 1.4) and of hue "
            "(0.1: a tenth of the circle of colours, each way). The defaults are those of Dassl, the library of "
            "CoOp's code."
        },
    )
    augment_views: int | None = HfArg(
        default=None,
        help="How many different changes an image has: epoch e uses number e modulo this, so that features of changed "
        "images can be kept, too (see cache_features). None: another one at each epoch.",
    )

    @property
    def augmentation(self) -> Augmentation | None:
        """The augmentation that these arguments ask for; `None` for `augment="none"`.

        Raises:
            ValueError: a value that is none of the choices or out of range.
        """
        parts = self.augment.split("+")
        if self.augment != "none" and (not set(parts) <= set(PARTS) or len(set(parts)) < len(parts)):
            raise ValueError(
                f"augment={shortened(self.augment)} is no choice; write 'none', or one or more of {', '.join(PARTS)}, "
                "joined by '+', such as 'crop+flip'."
            )
        scale, jitter = self.augment_scale, self.augment_jitter
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"Invalid value {shortened(scale)} for `augment_scale`: expected the smallest and the largest area of "
                "a crop, as shares of the picture above 0 and at most 1, such as [0.08, 1.0]."
            )
        if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
            raise ValueError(
                f"Invalid value {shortened(jitter)} for `augment_jitter`: expected four numbers of 0 or more, of "
                "brightness, contrast, saturation and hue, the last at most 0.5, such as [0.4, 0.4, 0.4, 0.1]."
            )
        views = checked(self.augment_views, Count | None, "augment_views")
        if self.augment == "none":
            return None
        return Augmentation(tuple(part for part in PARTS if part in parts), tuple(scale), tuple(jitter), views)


@dataclass(frozen=True)
class Augmentation:
    """Draws and applies changes of images.

    What is drawn for an image depends on nothing but a seed, the epoch, the image's row and its visit in the epoch.
    Numbers come from Philox, a generator with a counter, whose stream numpy keeps the same in all versions. Each part
    has its own of these numbers, so it is the same whichever other parts there are.

    Args:
        parts (`tuple[str, ...]`): some of `PARTS`, which are applied in this order.
        scale (`tuple[float, float]`): smallest and largest share of a picture's area that a crop has.
        jitter (`tuple[float, float, float, float]`): strengths of brightness, contrast, saturation and hue.
        views (`int`, *optional*): how many different changes an image has, which then follow one another: epoch e
            begins with number e modulo `views`. `None`: another one at each visit.
    """

    parts: tuple[str, ...]
    scale: tuple[float, ...] = (0.08, 1.0)
    jitter: tuple[float, ...] = (0.4, 0.4, 0.4, 0.1)
    views: int | None = None

    def __str__(self) -> str:
        """All that what is applied depends on, such as `crop(0.08, 1.0)+flip`."""
        settings = {"crop": str(self.scale), "jitter": str(self.jitter)}
        changes = "+".join(part + settings.get(part, "") for part in self.parts)
        return changes if self.views is None else f"{changes} in {self.views} views"

    def view(self, epoch: int, visit: int) -> tuple[int, int]:
        """The epoch and the visit whose changes an image has; the visit is 0 and the epoch below `views`, if these are
        limited."""
        return (epoch, visit) if self.views is None else ((epoch + visit) % self.views, 0)

    def draw(self, seed: int, epoch: int, row: int, visit: int = 0, aspect: float = 1.0) -> np.ndarray:
        """The changes of one image.

        Args:
            seed, epoch, row, visit (`int`): what they depend on; see the class.
            aspect (`float`): the picture's width divided by its height.

        Returns:
            Ten numbers: left, top, right and bottom of the crop as shares of the picture's width and height; 1 if it
            is mirrored, else 0; factors of brightness, contrast and saturation; the change of hue; the number of their
            order in `ORDERS`.
        """
        epoch, visit = self.view(epoch, visit)
        key, counter = (np.array(words, np.uint64) for words in ((seed, epoch), (0, 0, visit, row)))
        drawn = (np.random.Philox(key=key, counter=counter).random_raw(NUMBERS) >> np.uint64(11)) * 2.0**-53
        crop, flip, jitter = np.split(drawn, [2 * ATTEMPTS + 2, 2 * ATTEMPTS + 3])
        box = self._box(crop, aspect) if "crop" in self.parts else WHOLE
        flipped = float("flip" in self.parts and flip[0] < 0.5)
        if "jitter" not in self.parts:
            return np.array([*box, flipped, 1, 1, 1, 0, 0])
        lows = np.maximum(0, 1 - np.array(self.jitter[:3]))
        factors = lows + jitter[:3] * (1 + np.array(self.jitter[:3]) - lows)
        hue = (2 * jitter[3] - 1) * self.jitter[3]
        return np.array([*box, flipped, *factors, hue, int(jitter[4] * len(ORDERS))])

    def _box(self, numbers: np.ndarray, aspect: float) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a random crop, as shares of the picture."""
        (low, high), ratios = self.scale, np.log(RATIO)
        for area, ratio in numbers[: 2 * ATTEMPTS].reshape(-1, 2):
            area, ratio = low + area * (high - low), math.exp(ratios[0] + ratio * (ratios[1] - ratios[0]))
            width, height = math.sqrt(area * ratio / aspect), math.sqrt(area / ratio * aspect)
            if width <= 1 and height <= 1:
                left, top = numbers[-2] * (1 - width), numbers[-1] * (1 - height)
                return left, top, left + width, top + height
        # As in torchvision: the middle of the picture, as large as the range of ratios allows.
        width, height = min(1.0, RATIO[1] / aspect), min(1.0, aspect / RATIO[0])
        return (1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2


@torch.no_grad()
def apply(changes: np.ndarray, pictures: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Images that are cropped, resized, mirrored and coloured as was drawn.

    Each image is computed by itself, so that it does not depend on its batch.

    Args:
        changes (`np.ndarray`): (images, 10), what `Augmentation.draw` returned, in the memory of the CPU: a GPU is not
            waited for.
        pictures (`torch.Tensor`): (images, 3, height, width), uint8, on any device.
        size (`Sequence[int]`): height and width of the images.

    Returns:
        (images, 3, *size), uint8, on the same device.
    """
    return torch.stack([_apply(*pair, tuple(size)) for pair in zip(changes, pictures, strict=True)])


def _apply(changes: np.ndarray, picture: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    height, width = picture.shape[1:]
    left, right = _pixels(changes[0], changes[2], width)
    top, bottom = _pixels(changes[1], changes[3], height)
    image = picture[:, top:bottom, left:right].float()
    if image.shape[1:] != size:
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 255)
    if changes[4]:
        image = image.flip(-1)
    return change_colours(image, changes[5:9].tolist(), ORDERS[int(changes[9])]).round().to(torch.uint8)


def _pixels(start: float, end: float, count: int) -> tuple[int, int]:
    """The nearest whole pixels, at least one."""
    first = min(round(start * count), count - 1)
    return first, max(first + 1, min(round(end * count), count))

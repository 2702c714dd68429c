"""Brightness, contrast, saturation and hue of an image, as `ColorJitter` of torchvision has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow


def change_colours(image: torch.Tensor, changes: Sequence[float], order: Sequence[int]) -> torch.Tensor:
    """Change an image's colours, one after the other.

    Args:
        image (`torch.Tensor`): (3, height, width), floats from 0 to 255.
        changes (`Sequence[float]`): factors of brightness, contrast and saturation, each 1 for no change, and the
            change of hue, a share of the circle of colours, 0 for no change.
        order (`Sequence[int]`): numbers of the changes in the order in which they are made.

    Returns:
        (3, height, width), floats from 0 to 255.
    """
    functions = (_brightness, _contrast, _saturation, _hue)
    for number in order:
        if changes[number] != (0 if number == 3 else 1):
            image = functions[number](image, changes[number]).clamp(0, 255)
    return image


def _grey(image: torch.Tensor) -> torch.Tensor:
    return sum(weight * channel for weight, channel in zip(GREY, image))


def _brightness(image: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * image


def _contrast(image: torch.Tensor, factor: float) -> torch.Tensor:
    grey = (256 * _grey(image)).round().long()  # a sum of integers does not depend on its order, so on no thread
    return factor * image + (1 - factor) * (grey.sum() / (256 * grey.numel()))


def _saturation(image: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * image + (1 - factor) * _grey(image)


def _hue(image: torch.Tensor, change: float) -> torch.Tensor:
    red, green, blue = image
    value = image.amax(0)
    chroma = value - image.amin(0)
    parts = torch.where(chroma > 0, chroma, 1)  # grey pixels have no hue, and any does for them
    hue = torch.where(
        value == red,
        (green - blue) / parts,
        torch.where(value == green, (blue - red) / parts + 2, (red - green) / parts + 4),
    )
    # From HSV to RGB: a channel falls from value to value - chroma with the distance of the hue from its own.
    return torch.stack([value - chroma * _fall((hue + 6 * change + start) % 6) for start in (5, 3, 1)])


def _fall(place: torch.Tensor) -> torch.Tensor:
    return torch.minimum(place, 4 - place).clamp(0, 1)

"""Draw what augmentation makes of a picture, and measure crops of the stored picture against crops of the original.

    python examples/show_augmentation.py --out docs/augmentation.jpg
    python examples/show_augmentation.py photo_1.jpg photo_2.jpg

Without files it takes the photograph that ships with matplotlib. Training takes crops from the whole picture, squashed
to a square that is larger than the model's input. The table has the root mean square of the differences from the same
crops of the original file, in levels of 255, for squares of several sides.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image

from mmap_peft.multitask.augmentation import Augmentation, apply
from mmap_peft.multitask.training_pictures import LARGER


SIDE = 224  # of the model's input
FACTORS = (1, 1.5, 2, 3, 4)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def squashed(image: Image.Image, factor: float) -> torch.Tensor:
    """A whole picture as a square of `factor` times the model's input, (1, 3, side, side), uint8."""
    side = int(factor * SIDE)
    return torch.from_numpy(np.asarray(image.resize((side, side), BICUBIC)).transpose(2, 0, 1).copy())[None]


def original_crop(image: Image.Image, box: np.ndarray, resample: Image.Resampling = BICUBIC) -> np.ndarray:
    """A crop of the original picture, (224, 224, 3); `box` has its sides as shares of the picture's."""
    return np.asarray(image.resize((SIDE, SIDE), resample, box=tuple(box * np.tile(image.size, 2)))).astype(float)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """The root mean square difference of two images."""
    return float(np.sqrt(((one - other) ** 2).mean()))


def measure(image: Image.Image, crops: int) -> list[float]:
    """Mean differences for each of `FACTORS`, and of bilinear from bicubic crops of the original."""
    draws = [Augmentation(("crop",)).draw(0, 0, row, 0, image.width / image.height) for row in range(crops)]
    found = []
    for factor in FACTORS:
        picture, side, parts = squashed(image, factor), int(factor * SIDE), []
        for changes in draws:
            crop = apply(changes[None], picture, (SIDE, SIDE))[0].permute(1, 2, 0).numpy()
            parts.append(difference(crop, original_crop(image, np.round(changes[:4] * side) / side)))
        found.append(float(np.mean(parts)))
    boxes = [changes[:4] for changes in draws]
    plain = [difference(original_crop(image, box, BILINEAR), original_crop(image, box)) for box in boxes]
    return [*found, float(np.mean(plain))]


def sheet(image: Image.Image, columns: int = 6, side: int = 112) -> Image.Image:
    """The picture, and below it a row of each augmentation, each column another epoch."""
    rows = [("crop",), ("crop", "flip"), ("flip", "jitter"), ("crop", "flip", "jitter")]
    page = Image.new("RGB", ((columns + 1) * side, len(rows) * side), "white")
    picture, aspect = squashed(image, LARGER), image.width / image.height
    page.paste(image.resize((side, round(side / aspect)) if aspect > 1 else (round(side * aspect), side)), (0, 0))
    for row, parts in enumerate(rows):
        for column in range(columns):
            changes = Augmentation(parts).draw(0, column, 3, 0, aspect)
            pixels = apply(changes[None], picture, (SIDE, SIDE))[0].permute(1, 2, 0).numpy()
            page.paste(Image.fromarray(pixels).resize((side, side)), ((column + 1) * side, row * side))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, help="write a picture of augmented images of the first file")
    parser.add_argument("--crops", type=int, default=150, help="crops of each picture that are measured")
    options = parser.parse_args()
    files = options.files or [get_sample_data("grace_hopper.jpg", asfileobj=False)]
    sides = " | ".join(f"{factor:g} x {SIDE}" for factor in FACTORS)
    print(f"| picture | {sides} | bilinear |\n|---|{'---:|' * (len(FACTORS) + 1)}")
    for number, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        if options.out and not number:
            sheet(image).save(options.out, quality=80)
        cells = " | ".join(f"{value:.1f}" for value in measure(image, options.crops))
        print(f"| {Path(file).name}, {image.width} x {image.height} | {cells} |", flush=True)


if __name__ == "__main__":
    main()

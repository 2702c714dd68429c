"""Pictograms: a small data set with the shape of Office-Home (60 classes in four styles) that needs no download."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from .rendering import STYLES


# fmt: off
GLYPHS = {
    "sun": "☀", "cloud": "☁", "umbrella": "☂", "snowman": "☃", "comet": "☄", "star": "★", "telephone": "☎",
    "coffee cup": "☕", "shamrock": "☘", "pointing hand": "☝", "skull": "☠", "radiation sign": "☢",
    "biohazard sign": "☣", "ankh": "☥", "star and crescent": "☪", "peace sign": "☮", "yin yang": "☯",
    "ship wheel": "☸", "sad face": "☹", "smiling face": "☺", "moon": "☾", "female sign": "♀", "male sign": "♂",
    "chess king": "♔", "chess queen": "♕", "chess rook": "♖", "chess bishop": "♗", "chess knight": "♘",
    "spade": "♠", "heart": "♥", "club": "♣", "hot spring": "♨", "musical note": "♪", "recycling sign": "♻",
    "wheelchair": "♿", "die": "⚄", "flag": "⚑", "hammers": "⚒", "anchor": "⚓", "crossed swords": "⚔",
    "scales": "⚖", "flower": "⚘", "gear": "⚙", "atom": "⚛", "lily": "⚜", "warning sign": "⚠", "lightning": "⚡",
    "urn": "⚱", "scissors": "✂", "airplane": "✈", "envelope": "✉", "victory hand": "✌", "pencil": "✎",
    "pen nib": "✒", "check mark": "✓", "snowflake": "❄", "keyboard": "⌨", "mouse": "🐭", "cow": "🐮", "cat": "🐱",
}
# fmt: on
CLASS_NAMES = list(GLYPHS)
PER_CLASS = 30  # pictures of one class in one style


def draw(style: str, class_name: str, index: int, seed: int = 0) -> Image.Image:
    """The picture number `index` of a class in a style.

    Args:
        style: `"print"`, `"clipart"`, `"sketch"` or `"photo"`.
        class_name: a key of `GLYPHS`.
        index: which of the pictures.
        seed: seed of the whole data set.

    Returns:
        An RGB image of 48 x 48 pixels, the same for the same arguments in every process.
    """
    key = [seed, list(STYLES).index(style), CLASS_NAMES.index(class_name), index]
    return STYLES[style](GLYPHS[class_name], np.random.default_rng(key))


def _render(rows: dict, style: str, seed: int) -> dict:
    draw_row = functools.partial(draw, style, seed=seed)
    rows["image"] = [draw_row(CLASS_NAMES[label], index) for label, index in zip(rows["label"], rows["index"])]
    return rows


def pictograms(style: str, per_class: int = PER_CLASS, seed: int = 0) -> Dataset:
    """All pictures of one style as a data set with the columns `image`, `label`, `index` and `file`, drawn when
    asked for.

    Args:
        style: one of `STYLES`.
        per_class: pictures of each class.
        seed: seed of the pictures.
    """
    if style not in STYLES:
        raise ValueError(f"{style!r} is not a style of Pictograms; write one of {', '.join(STYLES)}.")
    labels = np.repeat(np.arange(len(CLASS_NAMES)), per_class)
    indices = np.tile(np.arange(per_class), len(CLASS_NAMES))
    files = [f"{style}/{CLASS_NAMES[label]}/{index}" for label, index in zip(labels, indices)]
    features = Features({"label": ClassLabel(names=CLASS_NAMES), "index": Value("int64"), "file": Value("string")})
    table = {"label": labels, "index": indices, "file": files}
    return Dataset.from_dict(table, features=features).with_transform(
        functools.partial(_render, style=style, seed=seed)
    )


def pictogram_domains(per_class: int = PER_CLASS, seed: int = 0) -> dict[str, Dataset]:
    """The data set of each style, by the style's name."""
    return {style: pictograms(style, per_class, seed) for style in STYLES}


def small_clip() -> Path:
    """The folder of the small CLIP that ships with the package: `CLIPModel.from_pretrained(small_clip())`."""
    return Path(__file__).parent / "small_clip"


def contact_sheet(styles: Sequence[str] = tuple(STYLES), class_names: Sequence[str] = CLASS_NAMES[::5]) -> Image.Image:
    """A picture of the data set: a row a style, a column a class."""
    samples = [[draw(style, name, 0) for name in class_names] for style in styles]
    return Image.fromarray(np.vstack([np.hstack(row) for row in samples]))

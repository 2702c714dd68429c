"""Pictograms: a small data set with the shape of Office-Home (60 classes in four styles) that needs no download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image, Value

from .rendering import STYLES


_LINES = Path(__file__).with_name("pictogram_glyphs.txt").read_text("utf-8").splitlines()
GLYPHS = {name: glyph for glyph, name in (line.split(" ", 1) for line in _LINES)}
CLASS_NAMES = list(GLYPHS)
PER_CLASS = 30  # pictures of one class in one style
DRAWING = "1"  # change this whenever pictures change, so that data sets that were drawn before are not used


def draw(style: str, class_name: str, index: int, seed: int = 0) -> PIL.Image.Image:
    """The picture number `index` of a class in a style.

    Args:
        style: `"print"`, `"clipart"`, `"sketch"` or `"photo"`.
        class_name: a key of `GLYPHS`.
        index: number of the picture.
        seed: seed of the whole data set.

    Returns:
        An RGB image of 48 x 48 pixels, the same for the same arguments in every process.
    """
    key = [seed, list(STYLES).index(style), CLASS_NAMES.index(class_name), index]
    return STYLES[style](GLYPHS[class_name], np.random.default_rng(key))


def _pictures(style: str, per_class: int, seed: int, drawn_with: dict[str, str]) -> Iterator[dict]:
    for label, name in enumerate(CLASS_NAMES):
        for index in range(per_class):
            image = draw(style, name, index, seed)
            yield {"image": image, "label": label, "index": index, "file": f"{style}/{name}/{index}"}


def pictograms(style: str, per_class: int = PER_CLASS, seed: int = 0) -> Dataset:
    """`per_class` pictures of each class in one style, with the columns `image`, `label`, `index` and `file`.

    They are drawn once, and kept where `datasets` keeps its files (`HF_DATASETS_CACHE`). `style` and `seed` are as for
    `draw`. An unknown style raises a `ValueError`.
    """
    if style not in STYLES:
        raise ValueError(f"{style!r} is not a style of Pictograms; write one of {', '.join(STYLES)}.")
    features = {"image": Image(), "label": ClassLabel(names=CLASS_NAMES), "index": Value("int64")}
    # `datasets` caches by these arguments, so they hold everything that a picture depends on.
    drawn_with = {"drawing": DRAWING, **{name: version(name) for name in ("numpy", "pillow", "matplotlib")}}
    arguments = {"style": style, "per_class": per_class, "seed": seed, "drawn_with": drawn_with}
    return Dataset.from_generator(_pictures, Features({**features, "file": Value("string")}), gen_kwargs=arguments)


def pictogram_domains(per_class: int = PER_CLASS, seed: int = 0) -> dict[str, Dataset]:
    """The data set of each style, by the style's name; arguments as for `pictograms`."""
    return {style: pictograms(style, per_class, seed) for style in STYLES}


def small_clip() -> Path:
    """The folder of the small CLIP that ships with the package: `CLIPModel.from_pretrained(small_clip())`."""
    return Path(__file__).parent / "small_clip"


def contact_sheet(
    styles: Sequence[str] = tuple(STYLES), class_names: Sequence[str] = CLASS_NAMES[::5]
) -> PIL.Image.Image:
    """A picture of the data set: a row a style, a column a class."""
    return PIL.Image.fromarray(
        np.vstack([np.hstack([np.asarray(draw(style, name, 0)) for name in class_names]) for style in styles])
    )

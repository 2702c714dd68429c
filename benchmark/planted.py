"""Tasks made of pictograms: families of tasks that are known beforehand, and ladders of many tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from datasets import ClassLabel, Dataset
from PIL import Image, ImageEnhance, ImageOps

from mmap_peft.data.pictograms import CLASS_NAMES, pictograms
from mmap_peft.data.rendering import STYLES


PLANTED = ("permuted_names", "class_lists", "visual", "none")
OF_ONE_LIST, OF_LISTS, OF_LADDERS = 26, 15, 48  # classes
PAIR = ("print", "photo")  # two styles that differ much
CHANGES: dict[str, Callable[[Image.Image], Image.Image] | None] = {
    "plain": None,
    "mirrored": ImageOps.mirror,
    "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "pale": lambda image: ImageEnhance.Contrast(image).enhance(0.6),
}


def planted_domains(family: str, per_class: int, seed: int) -> dict[str, Dataset]:
    """The tasks of one of `PLANTED`, by name. No picture is in two of them.

    * `"permuted_names"`: four styles of 26 classes, and other pictures of these with the names permuted.
    * `"class_lists"`: four disjoint lists of 15 classes, each in two styles; tasks of one style are a family.
    * `"visual"`: 26 classes in two styles, each plain, mirrored, dark and pale; tasks of one style are a family.
    * `"none"`: four styles of 26 classes: no family.

    Args:
        family: one of `PLANTED`.
        per_class: pictures of each class in each task.
        seed: decides which classes, and how names are permuted.
    """
    rng = np.random.default_rng(seed)
    classes = rng.permutation(len(CLASS_NAMES))
    one_list = classes[:OF_ONE_LIST]
    if family == "class_lists":
        lists = classes.reshape(-1, OF_LISTS)
        return {
            f"{style} {number}": _part(pictograms(style, per_class), part, _names(part))
            for style in PAIR
            for number, part in enumerate(lists)
        }
    if family == "visual":
        return {
            f"{style} {change}": _part(pictograms(style, per_class, number), one_list, _names(one_list), change)
            for style in PAIR
            for number, change in enumerate(CHANGES)
        }
    domains = {style: _part(pictograms(style, per_class), one_list, _names(one_list)) for style in STYLES}
    if family == "permuted_names":
        # A cycle in random order: no class keeps its name.
        cycle = rng.permutation(OF_ONE_LIST)
        permuted = np.empty(OF_ONE_LIST, dtype=int)
        permuted[cycle] = one_list[np.roll(cycle, 1)]
        other = {
            f"{style} permuted": _part(pictograms(style, per_class, 1), one_list, _names(permuted)) for style in STYLES
        }
        domains |= other
    return domains


def planted_groups(family: str) -> list[list[str]]:
    """The families that are planted, by the names of their tasks."""
    if family == "class_lists":
        return [[f"{style} {number}" for number in range(len(CLASS_NAMES) // OF_LISTS)] for style in PAIR]
    if family == "visual":
        return [[f"{style} {change}" for change in CHANGES] for style in PAIR]
    styles = list(STYLES)
    return [styles, [f"{style} permuted" for style in styles]] if family == "permuted_names" else [styles]


def ladder_domains(tasks: int, per_class: int) -> dict[str, Dataset]:
    """Four styles, each with `tasks / 4` disjoint lists of the first 48 classes."""
    lists = np.array_split(np.arange(OF_LADDERS), tasks // len(STYLES))
    return {
        f"{style} {number}": _part(pictograms(style, per_class), part, _names(part))
        for style in STYLES
        for number, part in enumerate(lists)
    }


def some_classes(first: int, last: int, per_class: int) -> dict[str, Dataset]:
    """Four styles of the classes with the numbers `first` to `last`, which is not one of them."""
    classes = range(first, last)
    return {style: _part(pictograms(style, per_class), classes, _names(classes)) for style in STYLES}


def _names(classes: Sequence[int]) -> list[str]:
    return [CLASS_NAMES[number] for number in classes]


def _part(data: Dataset, classes: Sequence[int], names: list[str], change: str = "plain") -> Dataset:
    """The pictures of some classes, with other numbers and names, and changed by one of `CHANGES`."""
    place = {int(number): index for index, number in enumerate(classes)}
    labels = data.with_format(None)["label"][:]
    rows = [row for row, label in enumerate(labels) if label in place]
    numbers = [place[labels[row]] for row in rows]
    part = data.select(rows).remove_columns("label").add_column("label", numbers)
    part = part.cast_column("label", ClassLabel(names=names))
    if CHANGES[change] is None:
        return part
    columns = part.remove_columns("image")[:]
    return Dataset.from_dict({**columns, "image": [CHANGES[change](row["image"]) for row in part]}, part.features)

"""The pictures of a report, as addresses that hold the picture itself."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from ..multitask.decoding import decode
from ..multitask.grouping import TaskGrouping
from ..multitask.plots import MOST_LABELS, plot_grouping


SIDE = 112  # pixels of a thumbnail
MOST_NUMBERS = 20  # classes; with more, the cells are too small for their numbers


def heat_map(grouping: TaskGrouping) -> str:
    """The picture of `plot_grouping`."""
    buffer = io.BytesIO()
    plot_grouping(grouping, buffer)
    return _address(buffer)


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> str:
    """A heat map of the share of each true class, a row, that was predicted as each class.

    Args:
        counts (`np.ndarray`): (classes, classes), number of images by true and predicted class.
        names (`Sequence[str]`): the classes.
    """
    from matplotlib.figure import Figure  # here, since importing it takes longer than the rest of this package

    size = min(3.5 + 0.3 * len(names), 11)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    shown = range(0, len(names), -(-len(names) // MOST_LABELS))
    texts = [names[number].replace("$", r"\$")[:30] for number in shown]
    axes.set_xticks(shown, texts, rotation=90, fontsize=8)
    axes.set_yticks(shown, texts, fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    for (row, column), count in np.ndenumerate(counts) if len(names) <= MOST_NUMBERS else ():
        if count:
            colour = "w" if shares[row, column] > 0.6 else "k"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    return _saved(figure)


def training_curves(stages: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Loss over steps of each stage, and the mean accuracy where it was measured.

    Args:
        stages: by name, entries of `log_history` of a `transformers.TrainerState`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(stages), 3.2), layout="constrained")
    for axes, (name, logs) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items()):
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.plot(*points(logs, "loss"), marker=".", label="loss")
        steps, values = points(logs, "eval_mean_accuracy")
        if steps:
            right = axes.twinx()
            right.plot(steps, values, "tab:orange", marker=".")
            right.set_ylabel("mean accuracy", color="tab:orange")
            right.set_ylim(0, 1.02)
    return _saved(figure)


def points(logs: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The steps at which something was logged, and its values, without those that are no finite numbers."""
    pairs = [(entry.get("step"), entry.get(name)) for entry in logs]
    kept = [pair for pair in pairs if all(isinstance(each, int | float) and math.isfinite(each) for each in pair)]
    return [step for step, _ in kept], [value for _, value in kept]


def thumbnail(images: datasets.Dataset, row: int) -> str:
    """A small copy of a picture in the column `image`."""
    stored = images.cast_column("image", datasets.Image(decode=False)) if images.features else images
    picture = decode(stored[row]["image"])
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if max(picture.size) < SIDE else "JPEG", quality=85)
    return _address(buffer)


def _saved(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return _address(buffer)


def _address(buffer: io.BytesIO) -> str:
    data = buffer.getvalue()
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

"""Pictures of a grouping."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from .grouping import TaskGrouping


def plot_grouping(grouping: TaskGrouping, path: str | os.PathLike) -> None:
    """Draw a heat map of the tasks' affinity, with frames around groups, and a dendrogram.

    Args:
        grouping (`TaskGrouping`): a grouping with `similarity`; one without raises a `ValueError`.
        path (`str`): the picture file; its ending gives the format.
    """
    from matplotlib.figure import Figure  # here, since importing it takes longer than the rest of this package

    if grouping.similarity is None:
        raise ValueError(f"A grouping of mode {grouping.mode!r} has no similarities to draw; use mode 'gradient'.")
    names = [task for group in grouping.groups for task in group]
    order = np.ix_(*[[grouping.tasks.index(name) for name in names]] * 2)
    figure = Figure(figsize=(4.2 + 0.9 * len(names), 2.4 + 0.5 * len(names)), layout="constrained")
    heat_map, tree = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_heat_map(heat_map, grouping, order, names)
    _draw_tree(tree, grouping.similarity[order], grouping.threshold, names)
    figure.savefig(path, dpi=120)


def _draw_heat_map(axes: Any, grouping: TaskGrouping, order: tuple[np.ndarray, ...], names: list[str]) -> None:
    from matplotlib.patches import Rectangle

    cosines, spread = grouping.similarity[order], None if grouping.spread is None else grouping.spread[order]
    pairs = cosines[~np.eye(len(names), dtype=bool)]
    low, high = (float(pairs.min()), float(pairs.max())) if len(pairs) else (0.0, 1.0)
    image = axes.imshow(cosines, cmap="viridis", vmin=low, vmax=high)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (row, column), cosine in np.ndenumerate(cosines):
        colour = "w" if cosine < (low + high) / 2 else "k"
        text = f"{cosine:.2f}" if row == column or spread is None else f"{cosine:.2f}\n±{spread[row, column]:.2f}"
        axes.text(column, row, text, ha="center", va="center", color=colour)
    start, frame = -0.5, {"fill": False, "edgecolor": "tab:red", "linewidth": 3, "clip_on": False}
    for size in map(len, grouping.groups):
        axes.add_patch(Rectangle((start, start), size, size, **frame))
        start += size
    axes.set_title("cosine of task gradients (± over snapshots)")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_tree(axes: Any, cosines: np.ndarray, threshold: float | None, names: list[str]) -> None:
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    if len(names) > 1:
        distances = squareform((1 - (cosines + cosines.T) / 2).clip(min=0), checks=False)
        tree = linkage(distances, method="average")
        dendrogram(tree, labels=names, orientation="left", ax=axes, color_threshold=0)
        axes.set_xlabel("1 - cosine")
        if threshold is not None:
            axes.axvline(1 - threshold, color="tab:red", linestyle="--", label="threshold")
            axes.legend()
    axes.set_title("average linkage")

"""Pictures of a grouping."""

from __future__ import annotations

import os

import numpy as np

from .grouping import TaskGrouping


def plot_grouping(grouping: TaskGrouping, path: str | os.PathLike) -> None:
    """Heat map of the tasks' affinity, groups framed, beside a dendrogram, as a picture file.

    Args:
        grouping (`TaskGrouping`): with `similarity`.
        path: the file; its ending says the format.

    Raises:
        ValueError: the grouping came about without similarities.
    """
    from matplotlib.figure import Figure  # here, since importing it takes longer than the rest of this package
    from matplotlib.patches import Rectangle
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    if grouping.similarity is None:
        raise ValueError(f"A grouping of mode {grouping.mode!r} has no similarities to draw; use mode 'gradient'.")
    order = [grouping.tasks.index(task) for group in grouping.groups for task in group]
    names = [grouping.tasks[task] for task in order]
    matrix = grouping.similarity[np.ix_(order, order)]
    figure = Figure(figsize=(4.2 + 0.9 * len(names), 2.4 + 0.5 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    pairs = matrix[~np.eye(len(names), dtype=bool)]
    low, high = (float(pairs.min()), float(pairs.max())) if len(pairs) else (0.0, 1.0)
    image = left.imshow(matrix, cmap="viridis", vmin=low, vmax=high)
    left.set_xticks(range(len(names)), names, rotation=30, ha="right")
    left.set_yticks(range(len(names)), names)
    for i in range(len(names)):
        for j in range(len(names)):
            dark = matrix[i, j] < (low + high) / 2
            spread = "" if i == j or grouping.spread is None else f"\n±{grouping.spread[order[i], order[j]]:.2f}"
            left.text(j, i, f"{matrix[i, j]:.2f}{spread}", ha="center", va="center", color="w" if dark else "k")
    start = 0
    for group in grouping.groups:
        frame = {"fill": False, "edgecolor": "tab:red", "linewidth": 3, "clip_on": False}
        left.add_patch(Rectangle((start - 0.5, start - 0.5), len(group), len(group), **frame))
        start += len(group)
    left.set_title("cosine of task gradients (± over snapshots)")
    figure.colorbar(image, ax=left, shrink=0.8)

    if len(names) > 1:
        distance = 1 - (matrix + matrix.T) / 2
        np.fill_diagonal(distance, 0)
        tree = linkage(squareform(distance.clip(min=0), checks=False), method="average")
        dendrogram(tree, labels=names, orientation="left", ax=right, color_threshold=0)
        right.set_xlabel("1 - cosine")
        if grouping.threshold is not None:
            right.axvline(1 - grouping.threshold, color="tab:red", linestyle="--", label="threshold")
            right.legend()
    right.set_title("average linkage")
    figure.savefig(path, dpi=120)

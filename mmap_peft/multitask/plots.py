"""Pictures of a grouping."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np

from .grouping import TaskGrouping


MOST_NUMBERS = 12  # tasks; with more, the cells are too small for their numbers
MOST_LABELS = 32


def plot_grouping(grouping: TaskGrouping, path: str | os.PathLike) -> None:
    """Draw a heat map of the tasks' affinity, with frames around groups, and a dendrogram.

    The diagonal shows the reliability of each task's affinity, if it was measured. Groups, and tasks inside a group,
    are in the order of the dendrogram. With many tasks only some of the labels are written.

    Args:
        grouping (`TaskGrouping`): a grouping with `similarity`; one without raises a `ValueError`.
        path (`str`): the picture file; its ending gives the format.
    """
    from matplotlib.figure import Figure  # here, since importing it takes longer than the rest of this package

    similarity = grouping.similarity
    if similarity is None:
        raise ValueError(f"A grouping of mode {grouping.mode!r} has no similarities to draw; use mode 'gradient'.")
    count = len(grouping.tasks)
    side = 0.65 * count if count <= MOST_NUMBERS else min(5 + 0.11 * count, 14)
    figure = Figure(figsize=(max(9, 4.4 + 1.6 * side), 2.4 + max(2, side)), layout="constrained")
    heat_map, tree = figure.subplots(1, 2, width_ratios=(3, 2))
    order, top, linked = _order(grouping, similarity)
    _draw_heat_map(heat_map, grouping, similarity, order)
    _draw_tree(tree, grouping, top, linked)
    measured = {name: getattr(grouping, name) for name in ("stability", "separation")}
    words = [f"{name} {value:.2f}" for name, value in measured.items() if value is not None]
    figure.suptitle("\n".join(grouping.remarks) or ", ".join(words), fontsize=10)
    figure.savefig(path, dpi=120)


def _order(grouping: TaskGrouping, similarity: np.ndarray) -> tuple[list[int], float, np.ndarray | None]:
    """The numbers of the tasks in the order of the heat map, the largest affinity of a pair (1 for cosines), and the
    linkage of the tasks, `None` for one task."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    count, affinity = len(grouping.tasks), (similarity + similarity.T) / 2
    if count < 2:
        return [0], 1.0, None
    pairs = affinity[np.triu_indices(count, 1)]
    top = float(pairs.max()) if grouping.affinity == "lookahead" else 1.0
    distances = (top - affinity).clip(min=0)
    np.fill_diagonal(distances, 0)
    linked = linkage(squareform(distances, checks=False), method="average", optimal_ordering=count <= 200)
    place = np.argsort(leaves_list(linked))
    numbers = [sorted(map(grouping.tasks.index, group), key=lambda task: place[task]) for group in grouping.groups]
    groups = sorted(numbers, key=lambda group: place[group].mean())
    return [task for group in groups for task in group], top, linked


def _draw_heat_map(axes: Any, grouping: TaskGrouping, similarity: np.ndarray, order: list[int]) -> None:
    from matplotlib.patches import Rectangle

    count, cells = len(order), np.ix_(order, order)
    affinity, spread = similarity[cells], None if grouping.spread is None else grouping.spread[cells]
    pairs = affinity[~np.eye(count, dtype=bool)]
    low, high = (float(pairs.min()), float(pairs.max())) if len(pairs) else (0.0, 1.0)
    if grouping.reliability is not None:
        np.fill_diagonal(affinity, grouping.reliability[order])
    image = axes.imshow(affinity, cmap="viridis", vmin=low, vmax=high)
    names = [grouping.tasks[task].replace("$", r"\$") for task in order]
    shown, size = range(0, count, -(-count // MOST_LABELS)), 10 if count <= MOST_NUMBERS else 7
    axes.set_xticks(shown, [names[task] for task in shown], rotation=90, fontsize=size)
    axes.set_yticks(shown, [names[task] for task in shown], fontsize=size)
    for (row, column), value in np.ndenumerate(affinity) if count <= MOST_NUMBERS else ():
        colour = "w" if value < (low + high) / 2 else "k"
        more = "" if row == column or spread is None else f"\n±{spread[row, column]:.2f}"
        text = f"{value:.2f}{more}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    group_of = grouping.group_numbers[order]
    starts = [0, *(place for place in range(1, count) if group_of[place] != group_of[place - 1]), count]
    frame: dict[str, Any] = {"fill": False, "edgecolor": "tab:red", "clip_on": False}
    frame["linewidth"] = 3 if count <= MOST_NUMBERS else 1.5
    for start, end in itertools.pairwise(starts):
        axes.add_patch(Rectangle((start - 0.5, start - 0.5), end - start, end - start, **frame))
    what = "cosine of task gradients" if grouping.affinity is None else f"affinity: {grouping.affinity}"
    details = ["± over snapshots"] if spread is not None and count <= MOST_NUMBERS else []
    details += ["diagonal: reliability"] if grouping.reliability is not None else []
    axes.set_title(what + (f"\n({', '.join(details)})" if details else ""), fontsize=10)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_tree(axes: Any, grouping: TaskGrouping, top: float, linked: np.ndarray | None) -> None:
    from scipy.cluster.hierarchy import dendrogram

    if linked is not None and linked[:, 2].any():
        many = len(grouping.tasks) > MOST_LABELS
        labels = [name.replace("$", r"\$") for name in grouping.tasks]
        dendrogram(linked, labels=labels, orientation="left", ax=axes, color_threshold=0, no_labels=many)
        axes.invert_yaxis()  # as the heat map, from top to bottom
        axes.set_xlabel("largest affinity - affinity" if grouping.affinity == "lookahead" else "1 - affinity")
        if grouping.threshold is not None:
            axes.axvline(top - grouping.threshold, color="tab:red", linestyle="--", label="threshold")
            axes.legend(fontsize=8)
    axes.set_title("average linkage", fontsize=10)

"""The plot of a report: accuracy over trainable parameters."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from mmap_peft.prompts.base import PromptConfig

from .summary import Row, interval


KINDS = {"prompts": "tab:blue", "other methods": "tab:orange"}
MARK = 5  # radius that is kept free around a mark, in points
FAR = (8, 16, 26, 38, 52, 68, 86, 106)  # distances of a label from its mark in points; the first that fits is used
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


def plot_accuracy(rows: Sequence[Row], title: str, path: str | os.PathLike) -> None:
    """Plot the mean accuracy and its 95 % interval over the trainable parameters, on a logarithmic axis.

    Marks are filled for all tasks together and hollow for each task alone. What trains nothing is a line.

    Args:
        rows (`Sequence[Row]`): the rows of one data set and amount.
        title (`str`): title of the plot.
        path: the file to write. Its ending decides the format.
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    points, halves, names = [], [], []
    for row in rows:
        mean = 100 * statistics.fmean(row.means)
        if not row.mean("trainable_parameters"):
            style, label = ("--", "zero-shot") if row.experiment.method == "zero_shot" else (":", row.experiment.name)
            axes.axhline(mean, color="0.4", linestyle=style, label=label)
            continue
        kind = "prompts" if isinstance(row.experiment.peft_config(), PromptConfig) else "other methods"
        alone = row.experiment.tasks == "alone"
        where = row.mean("trainable_parameters"), mean
        half = 100 * (interval(row.means) or 0)
        axes.errorbar(
            *where,
            yerr=half,
            fmt="o",
            color=KINDS[kind],
            markerfacecolor="white" if alone else KINDS[kind],
            elinewidth=0.8,
            capsize=2,
            label=f"{kind}, each task alone" if alone else kind,
            zorder=3,
        )
        points.append(where)
        halves.append(half)
        names.append(row.experiment.name)
    axes.set_xscale("log")
    axes.margins(0.12)
    axes.set(xlabel="trainable parameters", ylabel="mean accuracy in %", title=title)
    axes.grid(color="0.92")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    place_labels(axes, points, halves, names)
    figure.savefig(path, dpi=120)


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], halves: Sequence[float], names: Sequence[str]
) -> list[Bbox]:
    """Write a name beside each mark, as near as it can be without covering a mark, an error bar or another name.

    Args:
        axes: the axes, with their marks and limits.
        points: coordinates of the marks, in the units of the axes.
        halves: half the heights of their error bars, in the same units.
        names: the names, in the order of the marks.

    Returns:
        The boxes of the names, in pixels.
    """
    canvas = FigureCanvasAgg(axes.get_figure())
    canvas.draw()  # decides the sizes of texts and the position of the axes
    radius = MARK * axes.get_figure().dpi / 72
    taken = []
    for (right, up), half in zip(points, halves):
        low, mark, high = axes.transData.transform([(right, up - half), (right, up), (right, up + half)])
        taken += [Bbox([mark - radius, mark + radius]), Bbox([low - 1, high + 1])]
    frame, boxes = axes.get_window_extent(), []
    for point, name in sorted(zip(points, names)):
        for far, side in [*itertools.product(FAR, SIDES), (FAR[0], SIDES[0])]:
            label = _label(axes, point, name, far * side[0], far * side[1])
            label.update_positions(canvas.get_renderer())
            box = Text.get_window_extent(label)  # that of `Annotation` includes its line
            inside = frame.contains(*box.min) and frame.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            axes.add_artist(label)  # no place is free: it stands beside its mark, over other things
        taken.append(box)
        boxes.append(box)
    return boxes


def _label(axes: Axes, point: tuple[float, float], name: str, right: float, up: float) -> Annotation:
    return axes.annotate(
        name,
        point,
        xytext=(right, up),
        textcoords="offset points",
        ha="left" if right > 0 else "right" if right < 0 else "center",
        va="bottom" if up > 0 else "top" if up < 0 else "center",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6},
    )

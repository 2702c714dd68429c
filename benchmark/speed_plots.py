"""The plots of `speed`: times of steps, and how they grow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from .timing import ratio


COLORS = {
    "step": "tab:blue",
    "compiled": "tab:cyan",
    "shared": "tab:purple",
    "snapshot": "tab:brown",
    "plain": "tab:green",
    "truncated": "tab:orange",
    "practice": "tab:red",
}


def plot_speed(settings: Sequence[dict[str, Any]], title: str, path: str | os.PathLike) -> None:
    """Plot the time of each kind of step, divided by that of `floor` (see `ratio`). The floor is a dashed line.

    Args:
        settings: the field `training` of `speed.json`.
        title (`str`): title of the plot.
        path: the file to write. Its ending decides the format.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = [name for name in COLORS if name in settings[0]["median"] and name not in ("shared", "snapshot")]
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        heights = [ratio(one["seconds"], name, "floor") for one in settings]
        places = [place + (number - (len(names) - 1) / 2) * width for place in range(len(settings))]
        bars = axes.bar(places, heights, width, color=COLORS[name], label=name)
        axes.bar_label(bars, fmt="%.2g", fontsize=8)
    axes.axhline(1, color="0.4", linestyle="--", label="floor: image tower alone")
    axes.set_xticks(range(len(settings)), [f"batch {one['batch']}, tasks {one['tasks']}" for one in settings])
    axes.set(ylabel="time of a step / floor", title=title)
    axes.grid(color="0.92", axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(names) + 1, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_growth(panels: dict[str, dict[str, Any]], title: str, path: str | os.PathLike) -> None:
    """Plot the times of `step`, and of `shared` and `snapshot` if they were measured, over the number that grows.
    Times are divided by that of `floor` (see `ratio`), which is a dashed line.

    Args:
        panels: the field `growth` of `growth.json`.
        title (`str`): title of the plot.
        path: the file to write. Its ending decides the format.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (what, panel) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        values, seconds = panel["values"], panel["seconds"]
        for name in ("step", "shared", "snapshot"):
            if f"{name} {values[0]}" in seconds:
                heights = [ratio(seconds, f"{name} {value}", "floor") for value in values]
                axes.plot(values, heights, "o-", color=COLORS[name], label=name)
        axes.axhline(1, color="0.4", linestyle="--", label="floor: image tower alone")
        axes.set_xscale("log")
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.set(xlabel=what)
        axes.grid(color="0.92")
        axes.label_outer()
        axes.legend(fontsize=8, loc="lower left")
    figure.axes[0].set(ylabel="time / floor")
    figure.axes[0].set_ylim(bottom=0)  # at the end, since a fixed limit stops the scale from growing
    figure.suptitle(title)
    figure.savefig(path, dpi=120)

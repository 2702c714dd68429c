"""Bars of what steps cost, and lines of how that grows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from .timing import ratio


COLORS = {
    "step": "tab:blue",
    "compiled": "tab:cyan",
    "plain": "tab:green",
    "truncated": "tab:orange",
    "practice": "tab:red",
}


def plot_speed(settings: Sequence[dict[str, Any]], title: str, path: str | os.PathLike) -> None:
    """Time of each kind of step as a multiple of the floor's (see `ratio`), a dashed line, as a picture file.

    Args:
        settings: what `measure_speed` found of training.
        title (`str`): stands above.
        path: the file; its ending says the format.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = [name for name in COLORS if name in settings[0]["median"]]
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
    """Times of `step`, and of `shared` and `snapshot` where there are some, over what grows; the floor is dashed.

    Args:
        panels: what `measure_growth` found, by what grows.
        title (`str`): stands above.
        path: the file; its ending says the format.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (what, panel) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        for name, color in (("step", "tab:blue"), ("shared", "tab:cyan"), ("snapshot", "tab:orange")):
            taken = {value: panel["median"].get(f"{name} {value}") for value in panel["values"]}
            if None not in taken.values():
                axes.plot(list(taken), list(taken.values()), "o-", color=color, label=name)
        axes.axhline(panel["median"]["floor"], color="0.4", linestyle="--", label="floor: image tower alone")
        axes.set_xscale("log")
        axes.set_xticks(panel["values"], [str(value) for value in panel["values"]])
        axes.minorticks_off()
        axes.set(xlabel=what, ylim=(0, None))
        axes.grid(color="0.92")
        axes.label_outer()
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("seconds")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)

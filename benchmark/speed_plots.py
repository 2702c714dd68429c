"""The plots of `speed`: times of steps, and how they grow."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
    """Plot times and peak memory of `step`, and of `shared` and `snapshot` if they were measured, over the number that
    grows. Times are divided by that of `floor` (see `ratio`), which is a dashed line.

    Args:
        panels: the field `growth` of `growth.json`.
        title (`str`): title of the plot.
        path: the file to write. Its ending decides the format.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    rows = figure.subplots(2, len(panels), sharex="col", sharey="row", squeeze=False)
    for times, memory, (what, panel) in zip(*rows, panels.items()):
        values, peaks = panel["values"], panel["peak_bytes"]
        floors = [floor_of(panel, value) for value in values]
        times.axhline(1, color="0.4", linestyle="--", label="floor: image tower alone")
        memory.plot(values, _gigabytes(peaks, floors), "--", color="0.4", label="floor")
        for name in ("step", "shared", "snapshot"):
            if f"{name} {values[0]}" in peaks:
                runs = [f"{name} {value}" for value in values]
                heights = [ratio(panel["seconds"], run, floor) for run, floor in zip(runs, floors)]
                times.plot(values, heights, "o-", color=COLORS[name], label=name)
                memory.plot(values, _gigabytes(peaks, runs), "o-", color=COLORS[name], label=name)
        memory.set_xscale("log")
        memory.set_xticks(values, [str(value) for value in values])
        memory.minorticks_off()
        memory.set(xlabel=what)
        for axes in (times, memory):
            axes.grid(color="0.92")
            axes.label_outer()
            axes.legend(fontsize=8, loc="upper left")
    for (axes, *_), label in zip(rows, ("time / floor", "peak memory, GB")):
        axes.set(ylabel=label)
        axes.set_ylim(bottom=0)  # at the end, since a fixed limit stops the scale from growing
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_cached(
    settings: Sequence[dict[str, Any]],
    depth: int,
    accuracies: Mapping[float, float],
    title: str,
    path: str | os.PathLike,
) -> None:
    """Plot the time of a step with and without kept features over the first layer with prompts, and accuracies.

    Args:
        settings: the field `cached` of `cached.json`.
        depth (`int`): number of layers of the tower that was measured.
        accuracies (`Mapping[float, float]`): by the share of the layers that come before the first with prompts.
        title (`str`): title of the plot.
        path: the file to write. Its ending decides the format.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    times, percents = figure.subplots(1, 2)
    for number, one in enumerate(settings):
        for suffix, style in (("", "o--"), (", kept", "o-")):
            layers = [layer for layer in range(depth) if f"layer {layer}{suffix}" in one["ratios"]]
            heights = [one["ratios"][f"layer {layer}{suffix}"] for layer in layers]
            label = f"batch {one['batch']}, tasks {one['tasks']}{suffix}"
            times.plot(layers, heights, style, color=f"C{number}", label=label)
    times.axhline(1, color="0.4", linestyle=":", label="floor: image tower alone")
    times.set_xticks([layer for layer in range(depth) if f"layer {layer}" in settings[0]["ratios"]])
    times.set(xlabel=f"first layer with prompts, of {depth}", ylabel="time of a step / floor", ylim=(0, None))
    shares = sorted(accuracies)
    percents.plot([100 * share for share in shares], [100 * accuracies[share] for share in shares], "o-", color="0.2")
    percents.set(xlabel="layers before the first with prompts, %", ylabel="validation accuracy on Pictograms, %")
    for axes in (times, percents):
        axes.grid(color="0.92")
    times.legend(fontsize=8, loc="upper right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def floor_of(panel: dict[str, Any], value: int) -> str:
    """The name of the floor of a value that grows, in a field of `growth.json`: its own, if it has more images."""
    return f"floor {value}" if f"floor {value}" in panel["median"] else "floor"


def _gigabytes(peaks: dict[str, int | None], names: Sequence[str]) -> list[float]:
    return [float("nan") if peaks[name] is None else 1e-9 * peaks[name] for name in names]

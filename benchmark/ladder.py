"""How accuracy, parameters and time grow with the number of tasks."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from .summary import Row, interval


def ladder_lines(rows: Mapping[int, Sequence[Row]]) -> list[str]:
    """A table of the experiments by number of tasks.

    Args:
        rows: for each number of tasks, its experiments.
    """
    heads = ["tasks", "experiment", "mean accuracy", "parameters", "groups", "seconds of training", "seconds a step"]
    lines = ["## Ladder of tasks", "", f"| {' | '.join(heads)} |", f"|---:|---|{'---:|' * (len(heads) - 2)}"]
    for tasks, of_tasks in rows.items():
        for row in of_tasks:
            half = interval(row.means)
            accuracy = f"{100 * statistics.fmean(row.means):.1f}" + (f" ± {100 * half:.1f}" if half else "")
            groups = [len(result["groups"]) for result in row.results.values() if result["groups"]]
            cells = [tasks, row.experiment.name, accuracy, f"{row.mean('trainable_parameters'):,.0f}"]
            cells += [", ".join(map(str, groups)), f"{row.mean('seconds', 'train'):.0f}"]
            step = row.mean("seconds", "step")
            cells += ["" if step is None else f"{step:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def plot_ladder(rows: Mapping[int, Sequence[Row]], path: str | os.PathLike, label: str = "tasks") -> None:
    """Plot accuracy (with the 95 % interval over seeds), trained parameters and time of training over the number of
    tasks, or of what `label` says, a line for each experiment. `rows` are as for `ladder_lines`; the ending of `path`
    decides the format."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    names = list(dict.fromkeys(row.experiment.name for of_tasks in rows.values() for row in of_tasks))
    panels = {
        "mean accuracy in %": lambda row: 100 * statistics.fmean(row.means),
        "trained parameters": lambda row: row.mean("trainable_parameters"),
        "seconds of training, both stages": lambda row: row.mean("seconds", "train"),
    }
    for axes, (title, value) in zip(figure.subplots(1, 3), panels.items()):
        for name in names:
            points = [(tasks, row) for tasks, some in rows.items() for row in some if row.experiment.name == name]
            counts, values = [tasks for tasks, _ in points], [value(row) for _, row in points]
            halves = [100 * (interval(row.means) or 0) for _, row in points] if "accuracy" in title else None
            axes.errorbar(counts, values, yerr=halves, marker="o", capsize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(rows), list(map(str, rows)))
        axes.set(xlabel=label, title=title)
        axes.grid(color="0.92")
        if "parameters" in title:
            axes.set_yscale("log")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=120)

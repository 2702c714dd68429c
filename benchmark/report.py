"""The report of a study: tables and plots of its results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmap_peft.multitask.files import write_json

from .ladder import ladder_lines, plot_ladder
from .paired_report import Comparisons
from .planted_report import planted_lines, routing_lines
from .plots import plot_accuracy
from .references import published_lines
from .results_file import Results
from .run import Run
from .study import Study
from .summary import Row, grouping_controls, grouping_of, interval, with_gains
from .tables import origin_lines


REPORT_FILE, SUMMARY_FILE = "report.md", "summary.json"
NOTE = (
    "Accuracies in %, as they were after the last step; ± is half the 95 % interval of the mean over seeds (Student's "
    "t). Gains are differences of mean accuracies on the same images. Parameters, adapters and steps of a method "
    "trained on each task alone are those of all tasks together. Peak memory is that of the whole process while "
    "training."
)


def write_report(study: Study, results: Results, untuned: Sequence[str] = ()) -> str:
    """Write `report.md`, `summary.json`, and a plot for each data set and amount into the folder of results.

    Args:
        study (`Study`): the study.
        results (`Results`): its results. Results with other settings than the study's are left out, and the report
            names them.
        untuned (`Sequence[str]`): experiments with a grid but without a choice.

    Returns:
        The text of `report.md`.

    Raises:
        ValueError: no run has a result.
    """
    runs = study.runs() + study.planted_runs("groups") + study.planted_runs("new_tasks")
    current, stale, missing = results.sort(runs)
    if not current:
        raise ValueError(f"{results.folder} holds no result of study {study.name!r}; run it first.")
    lines = [f"# {study.name}", "", f"Model {study.model}; {len(current)} runs.", ""]
    lines += [*origin_lines(list(current.values())), *_duplicates(runs, current), "", NOTE, ""]
    if missing or stale:
        lines += [*_incomplete(missing, stale, len(runs)), ""]
    runs_by_place = _runs_by_place(study)
    rows_by_place = {place: rows for place, runs in runs_by_place.items() if (rows := _rows(runs, current))}
    if len(rows_by_place) > 1:
        rows_by_title = {runs_by_place[place][0].title: rows for place, rows in rows_by_place.items()}
        lines += [*_overview(rows_by_title), ""]
    lines += [*planted_lines(study, current), *_ladder(study, rows_by_place, results)]
    summary = {}
    for place, rows in rows_by_place.items():
        first, picture = runs_by_place[place][0], f"{place}.png"
        summary[place] = [row.to_dict() for row in rows]
        plot_accuracy(rows, first.title, results.folder / picture)
        compared = Comparisons(rows, study, planted=first.data.family is not None)
        lines += [f"## {first.title}", "", *_table(rows, compared), ""]
        lines += [f"![Accuracy and parameters]({picture})", "", *_block(compared.lines())]
        lines += [*routing_lines(rows), ""] if first.data.family else _all_controls(rows)
    lines += [*published_lines(study), "## Settings", "", *_settings(study, untuned), ""]
    write_json(summary, results.folder / SUMMARY_FILE)
    text = "\n".join(lines)
    (results.folder / REPORT_FILE).write_text(text)
    return text


def _runs_by_place(study: Study) -> dict[str, list[Run]]:
    runs_by_place: dict[str, list[Run]] = {}
    for run in study.runs():
        runs_by_place.setdefault(run.place, []).append(run)
    return runs_by_place


def _rows(runs: Sequence[Run], results: dict[str, dict[str, Any]]) -> list[Row]:
    rows: dict[str, Row] = {}
    for run in runs:
        if run.name in results:
            row = rows.setdefault(run.experiment.name, Row(run.experiment, {}))
            row.results[run.seed] = results[run.name]
    return with_gains(list(rows.values()))


def _ladder(study: Study, rows_by_place: dict[str, list[Row]], results: Results) -> list[str]:
    """The table and the picture of data sets that differ in their number of tasks; pictures of few-shot accuracies."""
    tasks = {run.place: run.data.tasks for run in study.runs() if run.data.tasks}
    rows = {tasks[place]: rows for place, rows in rows_by_place.items() if place in tasks}
    lines = []
    if rows:
        plot_ladder(rows, results.folder / "ladder.png")
        lines = [*ladder_lines(rows), "", "![Accuracy, parameters and time over the number of tasks](ladder.png)", ""]
    for data in study.data if len(study.shots) > 2 else ():
        shots = {run.shots: run.place for run in study.runs() if run.data == data and run.shots}
        rows = {number: rows_by_place[place] for number, place in shots.items() if place in rows_by_place}
        picture = f"{data.label}_shots.png"
        plot_ladder(rows, results.folder / picture, "training images of each class")
        lines += [f"![Accuracy, parameters and time over training images of each class]({picture})", ""]
    return lines


def _incomplete(missing: Sequence[Run], stale: Sequence[Run], total: int) -> list[str]:
    lines = [f"**Incomplete: {len(missing) + len(stale)} of {total} runs have no result.**"]
    for runs, what in ((missing, "missing"), (stale, "of other settings")):
        names = sorted({f"{run.experiment.name} ({run.title})" for run in runs})
        if names:
            lines.append(f"* {what}: {', '.join(names)}")
    return lines


def _overview(rows_by_title: dict[str, list[Row]]) -> list[str]:
    """A table with a line for each experiment: its parameters, and its mean accuracy by data set and amount."""
    titles, tables = list(rows_by_title), list(rows_by_title.values())
    lines = [f"| experiment | parameters | {' | '.join(titles)} |", f"|---|---:|{'---:|' * len(titles)}"]
    for name in dict.fromkeys(row.experiment.name for rows in tables for row in rows):
        of_name = [next((row for row in rows if row.experiment.name == name), None) for rows in tables]
        # A method may have more parameters for a data set with more tasks or classes.
        sizes = dict.fromkeys(row.to_dict()["trainable_parameters"] for row in of_name if row)
        cells = ["" if row is None else _mean(row.means) for row in of_name]
        lines.append(f"| {name} | {', '.join(f'{size:,}' for size in sizes)} | {' | '.join(cells)} |")
    return lines


def _block(lines: list[str]) -> list[str]:
    """Lines with an empty one behind them, if there are any."""
    return [*lines, ""] if lines else []


def _duplicates(runs: Sequence[Run], results: dict[str, dict[str, Any]]) -> list[str]:
    """For each data set and amount, how many training images are near-duplicates of test images."""
    counts: dict[str, list[dict[str, int]]] = {}
    for run in runs:
        if "duplicates" in results.get(run.name, {}):
            counts.setdefault(run.title, []).append(results[run.name]["duplicates"])
    lines = []
    for title, some in counts.items():
        found, dropped = (max(one[key] for one in some) for key in ("found", "dropped"))
        behind = f"; {dropped} more were dropped" if dropped else ""
        lines.append(f"* Training images that are near-duplicates of test images, {title}: {found}{behind}")
    return lines


def _table(rows: Sequence[Row], compared: Comparisons) -> list[str]:
    tasks = list(rows[0].to_dict()["accuracy"])
    heads = ["parameters", "share", *tasks, "mean", "worst", "over single-task", "over zero-shot"]
    heads += ["steps", "step ms", "peak MB", "adapter kB", "seeds"]
    lines = [f"| experiment | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for row in rows:
        values = row.to_dict()
        cells = [f"{values['trainable_parameters']:,}", f"{100 * values['share_of_base']:.2f} %"]
        cells += [_number(100, values["accuracy"].get(task)) for task in tasks]
        cells += [_mean(row.means) + compared.mark(row.experiment.name), _number(100, values["worst"])]
        cells += [_number(100, values[key], "+.1f") for key in ("gain_single_task", "gain_zero_shot")]
        cells += [
            _number(1, values["steps"], ".0f"),
            _number(1e3, values["step_seconds"], ".0f"),
            _number(1e-6, values["step_peak_bytes"], ".0f"),
        ]
        cells += [_number(1e-3, values["adapter_bytes"], ".1f"), str(len(values["seeds"]))]
        lines.append(f"| {row.experiment.name} | {' | '.join(cells)} |")
    return lines


def _all_controls(rows: list[Row]) -> list[str]:
    lines = []
    for family in grouping_controls(rows):
        lines += [f"### Controls of the grouping of {family[0].experiment.method}", "", *_controls(family), ""]
    return lines


def _controls(rows: Sequence[Row]) -> list[str]:
    lines = ["| grouping | mean | worst | groups found (by seed) |", "|---|---:|---:|---|"]
    for row in rows:
        groups = {
            seed: "; ".join(" + ".join(group) for group in result["groups"] or [])
            for seed, result in row.results.items()
        }
        if len(set(groups.values())) == 1:
            groups_text = next(iter(groups.values()))
        else:
            groups_text = ", ".join(f"{seed}: {text}" for seed, text in groups.items())
        cells = [grouping_of(row.experiment), _mean(row.means), _number(100, row.mean("worst")), groups_text]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _settings(study: Study, untuned: Sequence[str]) -> list[str]:
    """A table of the settings that each experiment was run with, where they differ from the defaults."""
    lines = []
    if untuned:
        lines += [f"Nothing was chosen on validation images for {', '.join(untuned)}.", ""]
    lines += ["| experiment | tasks | config | training |", "|---|---|---|---|"]
    for one in study.experiments:
        steps = {"steps_per_shot": one.steps_per_shot} if one.steps_per_shot else {}
        columns = one.config, {**one.training, **steps, **one.merging}
        parts = [", ".join(f"{name} {value}" for name, value in part.items()) for part in columns]
        lines.append(f"| {one.name} | {one.tasks} | {' | '.join(parts)} |")
    return lines


def _mean(values: Sequence[float]) -> str:
    half = interval(values)
    return f"{100 * sum(values) / len(values):.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def _number(factor: float, value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(factor * value, form)

"""Choose settings from the grids of experiments, by accuracy on a part of the training images."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from typing import Any

from mmap_peft.multitask.files import write_json

from .experiment import Experiment
from .results_file import Results
from .study import Study, point_text


CHOICES_FILE, TABLE_FILE = "choices.json", "choices.md"


def choose(study: Study, results: Results) -> dict[str, Any]:
    """Choose the point with the highest accuracy from the grid of each experiment. Writes `choices.json`, and a table
    to `choices.md`.

    The accuracy of a point is the mean of its validation runs: all data sets, fractions or shots, and seeds of
    `study.tuning`. Of points with equal accuracy the first is chosen. An experiment is left out while one of its
    validation runs has no result.

    Returns:
        For each experiment a dict with `of` (what it was chosen for), `tried` (all points and their accuracies) and
        `chosen` (a point).
    """
    experiments = [(one, study.validation_runs(one)) for one in study.experiments if one.grid]
    all_runs = [run for _, points in experiments for runs in points for run in runs]
    current, _, _ = results.sort(all_runs)
    choices = {}
    for experiment, points in experiments:
        if any(run.name not in current for runs in points for run in runs):
            continue
        tried = [
            {"point": point, "accuracy": statistics.fmean(current[run.name]["mean"] for run in runs)}
            for point, runs in zip(experiment.points, points)
        ]
        best = max(tried, key=lambda one: one["accuracy"])
        choices[experiment.name] = {"of": _of(study, experiment), "tried": tried, "chosen": best["point"]}
    results.folder.mkdir(parents=True, exist_ok=True)
    write_json(choices, results.folder / CHOICES_FILE)
    (results.folder / TABLE_FILE).write_text(f"# {study.name}\n\n{table(choices)}\n")
    return choices


def apply_choices(study: Study, results: Results) -> tuple[Study, list[str]]:
    """Put what was chosen into the experiments of a study.

    Returns:
        The study, and the names of the experiments with a grid but without a choice, which keep their own settings.

    Raises:
        ValueError: a choice was made for other settings or another grid, or `chosen_as` names an experiment without a
            grid.
    """
    path = results.folder / CHOICES_FILE
    choices = json.loads(path.read_text()) if path.is_file() else {}
    by_name = {experiment.name: experiment for experiment in study.experiments}
    experiments, untuned = [], []
    for experiment in study.experiments:
        source = by_name.get(experiment.chosen_as or experiment.name)
        if source is None or (experiment.chosen_as and not source.grid):
            raise ValueError(
                f"Experiment {experiment.name!r} takes what was chosen for {experiment.chosen_as!r}, which is no "
                f"experiment with a grid of study {study.name!r}; add it, or leave chosen_as out."
            )
        choice = choices.get(source.name) if source.grid else None
        if choice is not None and choice["of"] != json.loads(json.dumps(_of(study, source))):
            raise ValueError(
                f"{path} holds a choice for {source.name!r} that was made with other settings; run "
                "`python -m benchmark tune` again, or remove the file."
            )
        if source.grid and choice is None:
            untuned.append(experiment.name)
        experiments.append(experiment.at(choice["chosen"] if choice else {}))
    return replace(study, experiments=experiments, training={}), untuned


def _of(study: Study, experiment: Experiment) -> dict[str, Any]:
    """All settings that a choice depends on."""
    data, study = [one.settings for one in study.data], study.tuning
    amounts = {"fractions": study.fractions, "shots": study.shots, "seeds": study.seeds}
    return {**experiment.settings, "grid": experiment.grid, "data": data, "model": study.model, **amounts}


def table(choices: dict[str, Any]) -> str:
    """A Markdown table of all that was tried; the chosen points are bold."""
    lines = ["| experiment | settings | validation accuracy |", "|---|---|---:|"]
    for name, choice in choices.items():
        for one in choice["tried"]:
            mark = "**" if one["point"] == choice["chosen"] else ""
            lines.append(f"| {name} | {mark}{point_text(one['point'])}{mark} | {100 * one['accuracy']:.1f} % |")
    return "\n".join(lines)

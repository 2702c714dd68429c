"""Compare two experiments of a study: the difference, and the test images that only one of them gets right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from .means import words
from .paired import compare
from .predictions import FOLDER, read_predictions
from .results_file import Results
from .run import Run
from .study import Study
from .summary import Row
from .tables import table_lines


IMAGE = ["task", "image", "true"]
PAIRS = ["right", "predicted", "probability"]
HEADS = ["task", "image", "true class", "seeds", "right", "predicted", "probability of the true class"]


def compare_experiments(study: Study, results: Results, names: Sequence[str], most: int = 20) -> str:
    """A page with the comparison of two experiments, for each data set and amount.

    The difference is of the results in `results.jsonl`. The images are those of the runs whose predictions are on
    disk; the page names the other runs.

    Args:
        study (`Study`): the study.
        results (`Results`): its results.
        names: names of two of its experiments.
        most (`int`): how many images are listed, those with the largest difference first.

    Raises:
        ValueError: an experiment is none of the study's, both are the same, there is no result of both, or a file of
            predictions cannot be read.
    """
    known = [experiment.name for experiment in study.experiments]
    wrong = [name for name in names if name not in known]
    if wrong or len(set(names)) < 2:
        raise ValueError(
            f"{', '.join(wrong) or names[0]} cannot be compared; write two different experiments of study "
            f"{study.name!r}: {', '.join(known)}."
        )
    if most < 0:
        raise ValueError(f"--most is {most}; write 0 or more.")
    current, _, _ = results.sort(study.runs())
    lines = [f"# {names[0]} and {names[1]}", ""]
    for place in dict.fromkeys(run.place for run in study.runs()):
        here = [run for run in study.runs() if run.place == place and run.name in current]
        runs = {name: [run for run in here if run.experiment.name == name] for name in names}
        if all(runs.values()):
            lines += [*_of_place(runs, results, current, most), ""]
    if len(lines) == 2:
        raise ValueError(f"{results.folder} holds no result of both {names[0]} and {names[1]}; run them first.")
    return "\n".join(lines)


def _of_place(
    runs: dict[str, list[Run]], results: Results, current: dict[str, dict[str, Any]], most: int
) -> list[str]:
    first = next(iter(runs.values()))[0]
    rows = [Row(some[0].experiment, {run.seed: current[run.name] for run in some}) for some in runs.values()]
    difference = compare(*rows)
    lines = [f"## {first.title}", ""]
    if difference is None:
        lines += ["No seed has results of both that say which images were right.", ""]
    else:
        mean, low, high = (f"{100 * value:+.2f}" for value in (difference.mean, difference.low, difference.high))
        lines += [
            f"Difference: {mean} points of {words(first.protocol)}, 95 % interval {low} to {high}, "
            f"p = {difference.p:.2g}, seeds: {difference.seeds}.",
            "",
        ]
    tables, absent = {}, []
    for name, some in runs.items():
        for run in some:
            table = read_predictions(results.folder, run.name, current[run.name])
            if table is None:
                absent.append(f"{name} (seed {run.seed})")
            else:
                tables[name, run.seed] = table.to_pandas()
    if absent:
        lines += [f"Without predictions of this result in `{FOLDER}`: {', '.join(absent)}.", ""]
    return lines + _image_lines(list(runs), tables, most)


def _image_lines(names: list[str], tables: dict[tuple[str, int], pd.DataFrame], most: int) -> list[str]:
    """The images that only one of two experiments gets right, by how many seeds more than the other."""
    pairs = [
        tables[names[0], seed].merge(tables[names[1], seed], on=IMAGE, suffixes=("_0", "_1"), validate="1:1")
        for seed in sorted(seed for name, seed in tables if name == names[0] and (names[1], seed) in tables)
    ]
    if not pairs:
        return []
    both, found = pd.concat(pairs), {"seeds": ("task", "size")}
    for number in (0, 1):
        both[f"right_{number}"] = both[f"predicted_{number}"] == both["true"]
        found[f"right_{number}"] = (f"right_{number}", "sum")
        found[f"predicted_{number}"] = (f"predicted_{number}", lambda classes: ", ".join(dict.fromkeys(classes)))
        found[f"probability_{number}"] = (f"probability_true_{number}", lambda values: f"{values.mean():.2f}")
    images = both.groupby(IMAGE, as_index=False).agg(**found)
    images["more"] = (images["right_0"] - images["right_1"]).abs()
    images = images[images["more"] > 0].sort_values("more", ascending=False, kind="stable")
    more = [int((both[f"right_{number}"] & ~both[f"right_{1 - number}"]).sum()) for number in (0, 1)]
    lines = [
        f"Of {len(both)} predictions of each, {more[0]} are right by {names[0]} only, {more[1]} by {names[1]} only. "
        f"{len(images)} images are right with more seeds by one of them, {min(most, len(images))} of which are "
        f"listed; cells have {names[0]} / {names[1]}.",
        "",
    ]
    cells = [
        [*(row[key] for key in (*IMAGE, "seeds")), *(f"{row[f'{key}_0']} / {row[f'{key}_1']}" for key in PAIRS)]
        for row in images.head(most).to_dict("records")
    ]
    return lines + table_lines(HEADS, [[str(cell).replace("|", "\\|") for cell in row] for row in cells])

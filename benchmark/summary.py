"""Means and confidence intervals over seeds, gains over other experiments, and comparisons of groupings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from .experiment import Experiment


DEFAULT_GROUPING = "gradient"


def interval(values: Sequence[float], level: float = 0.95) -> float | None:
    r"""Half the width of the confidence interval of the mean, $t_{n-1} \, s / \sqrt n$ with Student's $t$. `None` for
    fewer than two values."""
    if len(values) < 2:
        return None
    standard_error = statistics.stdev(values) / math.sqrt(len(values))
    return float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * standard_error


@dataclass
class Row:
    """The results of one experiment on one data set with one fraction or number of shots.

    Args:
        experiment (`Experiment`): the experiment.
        results (`dict[int, dict]`): its results by seed.
        gain_single_task (`float`, *optional*): its mean accuracy minus that of the same method and config trained on
            each task alone; see `gain`.
        gain_zero_shot (`float`, *optional*): its mean accuracy minus that of zero-shot.
    """

    experiment: Experiment
    results: dict[int, dict[str, Any]]
    gain_single_task: float | None = None
    gain_zero_shot: float | None = None

    @property
    def means(self) -> list[float]:
        """Mean accuracy of each seed."""
        return [result["mean"] for result in self.results.values()]

    def mean(self, *keys: str) -> float | None:
        """Mean over seeds of one field of the results, given by its keys. `None` if it is `None` in a result."""
        values = list(self.results.values())
        for key in keys:
            values = [value[key] for value in values]
        return None if None in values else statistics.fmean(values)

    def to_dict(self) -> dict[str, Any]:
        """The row for a JSON file."""
        tasks = next(iter(self.results.values()))["accuracy"]
        return {
            "experiment": self.experiment.name,
            **self.experiment.settings,
            "seeds": list(self.results),
            "accuracy": {task: self.mean("accuracy", task) for task in tasks},
            "mean": statistics.fmean(self.means),
            "interval_95": interval(self.means),
            "worst": self.mean("worst"),
            "gain_single_task": self.gain_single_task,
            "gain_zero_shot": self.gain_zero_shot,
            "trainable_parameters": round(self.mean("trainable_parameters")),
            "share_of_base": self.mean("share_of_base"),
            "adapter_bytes": round(self.mean("adapter_bytes")),
            "steps": self.mean("steps"),
            "step_seconds": self.mean("seconds", "step"),
            "total_seconds": self.mean("seconds", "total"),
            "step_peak_bytes": self.mean("peak_bytes", "step"),
            "peak_bytes": self.mean("peak_bytes", "total"),
            "groups": {seed: result["groups"] for seed, result in self.results.items()},
        }


def with_gains(rows: list[Row]) -> list[Row]:
    """Set the gains of the rows of one data set and amount, and return the rows."""
    for row in rows:
        experiment = row.experiment
        for other in rows:
            baseline = other.experiment
            if baseline.method == "zero_shot" and experiment.method != "zero_shot":
                row.gain_zero_shot = gain(row, other)
            same = (baseline.method, baseline.config) == (experiment.method, experiment.config)
            if same and baseline.tasks == "alone" and not baseline.merging and experiment.tasks != "alone":
                row.gain_single_task = gain(row, other)
    return rows


def gain(row: Row, over: Row) -> float | None:
    """The mean accuracy of one row minus that of another, averaged over the seeds that both have. `None` if they have
    no seed in common.

    Raises:
        ValueError: results of the same seed were measured on different images.
    """
    seeds = check_same_images(row, over)
    differences = [row.results[seed]["mean"] - over.results[seed]["mean"] for seed in seeds]
    return statistics.fmean(differences) if differences else None


def check_same_images(row: Row, over: Row) -> list[int]:
    """The seeds that both rows have. Raises a `ValueError` if results of one seed are of different images."""
    seeds = [seed for seed in row.results if seed in over.results]
    for seed in seeds:
        one, other = row.results[seed], over.results[seed]
        tested = {one.get("test_images"), other.get("test_images")} - {None}  # results of earlier versions have none
        if one["split"] != other["split"] or len(tested) > 1:
            raise ValueError(
                f"Results of {row.experiment.name!r} and {over.experiment.name!r} for seed {seed} are of different "
                "images; remove those of the older data, and run the study again."
            )
    return seeds


def grouping_of(experiment: Experiment) -> str:
    """The `grouping` of an experiment's training arguments."""
    return experiment.training.get("grouping", DEFAULT_GROUPING)


def grouping_controls(rows: list[Row]) -> list[list[Row]]:
    """Families of two or more rows that differ only in `grouping`. The row of the default grouping is the first
    of its family."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        experiment = row.experiment
        if experiment.tasks == "together" and experiment.training.get("sharing", "groups") == "groups":
            others = sorted((name, value) for name, value in experiment.training.items() if name != "grouping")
            families.setdefault(repr((experiment.method, experiment.config, others)), []).append(row)
    return [
        sorted(family, key=lambda row: grouping_of(row.experiment) != DEFAULT_GROUPING)
        for family in families.values()
        if len({grouping_of(row.experiment) for row in family}) > 1
    ]

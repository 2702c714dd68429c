"""The part of a report that says which differences between experiments hold."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .means import words
from .paired import DRAWS, compare, mcnemar
from .study import Study
from .summary import Row


MARK = "*"


class Comparisons:
    """Compares an experiment with the others of one data set and amount, on the same test images.

    Args:
        rows (`Sequence[Row]`): the experiments.
        study (`Study`): the experiments are compared with its `reference`. If it has none, with the first experiment
            of planted families, and of other data sets with the one that has the highest mean.

    Attributes:
        reference (`Row` or `None`): that experiment. `None` if it has no results with `correct`, in which case
            nothing is compared.
        differences: the difference of the reference minus each other experiment, by name; `None` for those without
            results with `correct` for the same seeds.
    """

    def __init__(self, rows: Sequence[Row], study: Study, planted: bool) -> None:
        known = [row for row in rows if any(result.get("correct") for result in row.results.values())]
        if study.reference is not None:
            known = [row for row in known if row.experiment.name == study.reference]
        elif not planted:
            known.sort(key=lambda row: -statistics.fmean(row.means))
        self.reference = known[0] if known else None
        self.differences = {
            row.experiment.name: compare(self.reference, row)
            for row in rows
            if self.reference is not None and row is not self.reference
        }
        self._rows, self._words = {row.experiment.name: row for row in rows}, words(study.protocol)

    def mark(self, name: str) -> str:
        """`*` if the difference of an experiment holds."""
        difference = self.differences.get(name)
        return MARK if difference is not None and difference.holds else ""

    def lines(self) -> list[str]:
        """A table of the differences; none if nothing is compared."""
        found = {name: difference for name, difference in self.differences.items() if difference is not None}
        if not found:
            return []
        name, mean = self.reference.experiment.name, statistics.fmean(self.reference.means)
        lines = [
            f"Difference: {self._words} of {name} minus that of the row, in points, with its 95 % interval and p: "
            f"paired bootstrap over seeds and test images ({DRAWS:,} draws, see `benchmark/paired.py`), for each row "
            f"by itself. {MARK} The interval leaves out 0. McNemar: p of the exact test on the images of all seeds, "
            "which leaves the variation over seeds out.",
            "",
            "| experiment | mean | difference | 95 % interval | p | McNemar | seeds |",
            "|---|---:|---:|---:|---:|---:|---:|",
            f"| {name} | {100 * mean:.1f} | | | | | |",
        ]
        for name, one in found.items():
            row = self._rows[name]
            cells = [f"{100 * statistics.fmean(row.means):.1f}", f"{100 * one.mean:+.1f}{self.mark(name)}"]
            cells += [f"{100 * one.low:+.1f} to {100 * one.high:+.1f}", f"{one.p:.2g}"]
            cells += [f"{mcnemar(self.reference, row):.2g}", str(one.seeds)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        without = [name for name in self.differences if name not in found]
        if without:
            lines += ["", f"Not compared, as their results do not say which images were right: {', '.join(without)}."]
        return lines

"""Published accuracies on suites, to be shown beside results of the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .reading import build, check_mapping, read_yaml
from .study import Study
from .suite_files import SUITES, read_suite


FILE = SUITES / "references.yaml"
NOTE = (
    "Accuracies in %, as published for the same model and suite. Zero-shot differs from ours only in details, such as "
    "class names and image processing; all others were trained otherwise."
)


@dataclass(frozen=True)
class Reference:
    """A published table.

    Args:
        suite, model (`str`): name of the suite, and of the CLIP on the Hub.
        source (`str`): authors, year, table and address.
        columns (`list[str]`): tasks of the suite, or `"mean"`.
        rows (`dict[str, list[float]]`): by method, an accuracy in % for each column.

    Raises:
        ValueError: a row has another number of values than there are columns, or a value that is no accuracy in %.
    """

    suite: str
    model: str
    source: str
    columns: list[str]
    rows: dict[str, list[float]]

    def __post_init__(self) -> None:
        check_mapping(self.rows, f"rows of {self.source!r}")
        for method, values in self.rows.items():
            if len(values) != len(self.columns) or not all(0 < value < 100 for value in values):
                raise ValueError(
                    f"Row {method!r} of {self.source!r} is {values}; write an accuracy in % for each of "
                    f"{', '.join(self.columns)}."
                )


def read_references() -> list[Reference]:
    """All published tables of `benchmark/suites/references.yaml`."""
    return [build(Reference, values, FILE) for values in read_yaml(FILE)["references"]]


def published_lines(study: Study) -> list[str]:
    """For each suite of a study, a table of what was published for it and for exactly the study's model."""
    lines, suites = [], {data.suite for data in study.data if data.suite}
    for suite in sorted(suites):
        found = [one for one in read_references() if (one.suite, one.model) == (suite, study.model)]
        if found:
            columns = [*(task.name for task in read_suite(suite).tasks), "mean"]
            lines += [f"## {suite}, as published", "", NOTE, "", *_table(found, columns), ""]
            lines += [*(f"{number}. {one.source}" for number, one in enumerate(found, 1)), ""]
    return lines


def _table(references: Sequence[Reference], columns: Sequence[str]) -> list[str]:
    lines = [f"| method | {' | '.join(columns)} | source |", f"|---|{'---:|' * (len(columns) + 1)}"]
    for number, one in enumerate(references, 1):
        for method, values in one.rows.items():
            value = dict(zip(one.columns, map(str, values)))
            lines.append(f"| {method} | {' | '.join(value.get(column, '') for column in columns)} | {number} |")
    return lines

"""Parts of Markdown pages that several measurements share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def origin_lines(results: Sequence[dict[str, Any]]) -> list[str]:
    """Machine, versions and commit of results; each line lists all that occur among them.

    Args:
        results: dicts with what `machine.origin` returns.
    """

    def distinct(texts: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(texts))

    machines = (result["machine"] for result in results)
    codes = [result["code"] for result in results]
    machine = distinct(f"{one['device']}, threads: {one['threads']}, {one['system']}" for one in machines)
    versions = distinct(", ".join(f"{name} {number}" for name, number in code["versions"].items()) for code in codes)
    commit = distinct(f"{code['commit'] or 'unknown'}{' with changes' * bool(code['changed'])}" for code in codes)
    return [f"* Machine: {machine}", f"* Versions: {versions}", f"* Commit: {commit}"]


def head_lines(title: str, measurement: dict[str, Any]) -> list[str]:
    """The head of a page of measurements: its title, and where and with which settings they were made."""
    settings = ", ".join(f"{name}: {value}" for name, value in measurement["settings"].items())
    return [f"# {title}", "", *origin_lines([measurement]), f"* Settings: {settings}", ""]


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table of numbers."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---:|' * len(heads)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def cell(value: float | None, factor: float) -> str:
    """`factor * value` as a whole number; an empty cell for `None`."""
    return "" if value is None else f"{factor * value:.0f}"

"""The notebook runs from end to end, and the output that is kept in it is small and of its own code."""

import ast

import nbformat

from .tour import TOUR, executed


def results(notebook: nbformat.NotebookNode) -> list[str]:
    """The values of the cells that end with one."""
    return [
        output.data["text/plain"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "execute_result" and "image/png" not in output.data
    ]


def kinds(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """What each cell shows."""
    return [
        {kind for output in cell.get("outputs", []) for kind in output.get("data", {"printed": ""})}
        for cell in notebook.cells
    ]


def test_the_tour():
    kept, notebook = nbformat.read(TOUR, as_version=4), executed()
    assert kinds(notebook) == kinds(kept)
    before, after, same = map(ast.literal_eval, results(notebook))
    assert sum(after.values()) / 3 > sum(before.values()) / 3 + 0.04
    assert same
    assert TOUR.stat().st_size < 400_000
    assert "stderr" not in TOUR.read_text()

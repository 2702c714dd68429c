"""Runs the notebook `examples/tour.ipynb`. `python -m tests.tour` writes its output anew."""

from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient


TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"


def executed() -> nbformat.NotebookNode:
    """The notebook with new output, without progress bars and warnings, which name files of this machine."""
    notebook = nbformat.read(TOUR, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)  # version of Python
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), TOUR)

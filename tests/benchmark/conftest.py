"""Studies of runs that a small script stands for, so that no test of the runner trains."""

from __future__ import annotations

import sys
import textwrap

import pytest
import yaml

from benchmark import report, runner
from benchmark.results_file import Results
from benchmark.study import Study


EXPERIMENTS = {
    "zero_shot": {"method": "zero_shot"},
    "mmap": {"method": "mmap"},
    "lora": {"method": "lora", "training": {"learning_rate": 0.001}},
}


def write_study(root, experiments=EXPERIMENTS, names=None, **fields):
    """Writes a study and its experiments below `root`, and returns the study's path."""
    for folder in ("studies", "experiments"):
        (root / folder).mkdir(exist_ok=True)
    for name, values in experiments.items():
        (root / "experiments" / f"{name}.yaml").write_text(yaml.safe_dump(values))
    small = {"name": "s", "data": [{"name": "pictograms", "per_class": 3}], "fractions": [0.3], "seeds": [0, 1]}
    path = root / "studies" / "s.yaml"
    path.write_text(yaml.safe_dump({**small, "experiments": names or list(experiments), **fields}))
    return path


@pytest.fixture
def study_file(tmp_path):
    """`write_study` below `tmp_path`."""
    return lambda *args, **fields: write_study(tmp_path, *args, **fields)


@pytest.fixture
def study(study_file):
    return lambda *args, **fields: Study.read(study_file(*args, **fields))


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results" / "s")


@pytest.fixture
def no_pictures(monkeypatch):
    """Reports draw nothing: for tests of their text."""
    for name in ("plot_accuracy", "plot_ladder"):
        monkeypatch.setattr(report, name, lambda *args: None)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a script in the place of `measure`: `code` after `run` and `path` are known; it is to make `result`."""

    def make(code="result = answer(0.5)"):
        script = tmp_path / "fake.py"
        head = """
            import json, os, signal, sys, time
            run, path = json.load(sys.stdin), sys.argv[1]
            name = run["experiment"]["name"]
            def answer(mean):
                settings = json.loads(os.environ["SETTINGS"])[name + str(run["seed"])]
                return {"settings": settings, "mean": mean, "seconds": {"total": 1.0}, "peak_bytes": {"total": 2**20},
                        "threads": os.environ["OMP_NUM_THREADS"], "process": os.getpid()}
        """
        script.write_text(
            textwrap.dedent(head) + textwrap.dedent(code) + "\nopen(path, 'w').write(json.dumps(result))"
        )
        monkeypatch.setattr(runner, "MEASURE", (sys.executable, str(script)))

    return make


def full_result(run, mean=0.5, **fields):
    """A result as `measure` makes them, of two tasks around a mean."""
    return {
        "accuracy": {"print": mean - 0.1, "photo": mean + 0.1},
        "mean": mean,
        "worst": mean - 0.1,
        "groups": [["print"], ["photo"]],
        "trainable_parameters": 5400,
        "share_of_base": 0.004,
        "adapter_bytes": 23_800,
        "steps": 7,
        "seconds": {"step": 0.25, "train": 3.0, "evaluate": 2.0, "total": 6.0},
        "peak_bytes": {"step": 700_000_000, "total": 800_000_000},
        "split": f"digest {run.seed}",
        "settings": run.settings,
        "seed": run.seed,
        "machine": {"device": "CPU (x86_64)", "system": "Linux", "threads": 1},
        "code": {"versions": {"torch": "2"}, "commit": "abc", "changed": False},
        **fields,
    }

"""The comparison of clusterings."""

import json
import sys

import numpy as np
import pytest

from benchmark.__main__ import main
from benchmark.clustering import KINDS, clustering_text, measure_clustering, random_gains


def test_the_command_compares_with_average_linkage(tmp_path, monkeypatch, capsys):
    arguments = ["clustering", "--out", str(tmp_path), "--tasks", "6", "12", "--seconds", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    assert main() == 0
    found = json.loads((tmp_path / "clustering.json").read_text())
    assert [(one["kind"], one["tasks"]) for one in found["clustering"]] == [
        (k, size) for k in KINDS for size in (6, 12)
    ]
    for one in found["clustering"]:
        assert one["value"] >= one["linkage_value"] - 1e-9 and one["gap"] == 0
        assert 1 <= one["groups"] <= one["tasks"] and 1 <= one["linkage_groups"] <= one["tasks"]
    text = (tmp_path / "clustering.md").read_text()
    assert text == clustering_text(found) and capsys.readouterr().out == text + "\n"
    assert text.count("| exact |") == 6


def test_gains_are_symmetric_and_repeatable():
    gains = random_gains(30, 1.0, 0)
    assert np.array_equal(gains, gains.T) and not gains.diagonal().any()
    assert np.array_equal(gains, random_gains(30, 1.0, 0)) and not np.array_equal(gains, random_gains(30, 1.0, 1))


def test_one_task_is_no_comparison(tmp_path):
    with pytest.raises(ValueError, match="1 tasks have no pairs; write 2 or more"):
        measure_clustering(tmp_path, [1])

"""Planted families: their tasks, their runs, and what is reported of them."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from benchmark.data import DataSet
from benchmark.experiment import Experiment
from benchmark.ladder import ladder_lines, plot_ladder
from benchmark.measure import measure
from benchmark.planted import PLANTED, planted_domains, planted_groups
from benchmark.planted_report import planted_lines, routing_lines
from benchmark.report import write_report
from benchmark.run import Run
from benchmark.summary import Row

from .conftest import full_result


SHORT = {
    "max_steps": 1,
    "per_device_train_batch_size": 16,
    "grouping_steps": 2,
    "grouping_snapshots": 2,
    "snapshot_images": 8,
}


@pytest.mark.parametrize("family", PLANTED)
def test_tasks_of_a_family(family):
    domains, again = planted_domains(family, 2, 0), planted_domains(family, 2, 0)
    assert list(domains) == [task for group in planted_groups(family) for task in group]
    names = {name: data.features["label"].names for name, data in domains.items()}
    assert names == {name: data.features["label"].names for name, data in again.items()}
    pictures = [np.asarray(row["image"]).tobytes() for data in domains.values() for row in data]
    assert len(set(pictures)) == len(pictures)
    for data in domains.values():
        assert np.bincount(data["label"][:]).tolist() == [2] * len(data.features["label"].names)
    if family == "permuted_names":
        own, permuted = names["print"], names["print permuted"]
        assert sorted(own) == sorted(permuted) and not any(one == other for one, other in zip(own, permuted))
    if family == "class_lists":
        lists = [names[task] for task in planted_groups(family)[0]]
        assert len(set(chain(*lists))) == 60


def test_groups_by_name():
    data = DataSet("planted", family="visual")
    assert data.groups("planted", 0) == planted_groups("visual")
    first, second = (data.groups(f"random {number}", 0) for number in (1, 2))
    assert first != second and data.groups("random 1", 0) == first
    for groups in first, second:
        assert sorted(map(len, groups)) == [4, 4]
        assert sorted(chain(*groups)) == sorted(chain(*planted_groups("visual")))
    halves = DataSet("planted", family="none").groups("random 1", 0)
    assert sorted(map(len, halves)) == [2, 2] and sorted(chain(*halves)) == sorted(*planted_groups("none"))
    for name in "random", "random x", "planted 1", "other":
        with pytest.raises(ValueError, match="is no grouping of data set"):
            data.groups(name, 0)
    with pytest.raises(ValueError, match="is no grouping of data set 'pictograms'"):
        DataSet("pictograms").groups("planted", 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "planted"}, "family of data set 'planted' is None; write permuted_names"),
        ({"name": "planted", "family": "cats"}, "is 'cats'"),
        ({"name": "ladder"}, "is None; write a multiple of 4"),
        ({"name": "ladder", "tasks": 6}, "is 6; write a multiple of 4"),
        ({"name": "pictograms", "family": "none"}, "was given family"),
    ],
)
def test_mistakes_in_data_sets_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        DataSet(**fields)


def test_a_ladder_has_the_same_images_on_every_rung():
    def images(tasks):
        domains, _ = DataSet("ladder", tasks=tasks, per_class=2).read(0.5, None, 0)
        assert len(domains) == tasks
        return sorted(name for data in domains.values() for name in data["file"][:])

    assert images(4) == images(16)


def test_an_experiment_with_groups_has_no_other():
    assert Experiment("x", "mmap", groups="planted").settings["groups"] == "planted"
    with pytest.raises(ValueError, match="has groups and grouping; write one of the two"):
        Experiment("x", "mmap", groups="planted", training={"grouping": "all"})
    with pytest.raises(ValueError, match="trains each task alone, so groups has no meaning"):
        Experiment("x", "mmap", groups="planted", tasks="alone")


@pytest.fixture(scope="module")
def runs():
    data = DataSet("planted", family="class_lists", per_class=3)
    run = Run(Experiment("x", "mmap", training=SHORT), data, None, 1, 0, evaluated_on="groups")
    other = Experiment("y", "mmap", training=SHORT, groups="random 1", routing=True)
    return {"groups": run, "test": replace(run, experiment=other, evaluated_on="test")}


@pytest.fixture(scope="module")
def measured(runs):
    return {kind: measure(run) for kind, run in runs.items()}


def test_the_groups_of_each_affinity(measured):
    found = measured["groups"]["affinities"]
    assert list(found) == ["cosine", "early", "lookahead", "directions"]
    for one in found.values():
        assert sorted(chain(*one["groups"])) == sorted(chain(*planted_groups("class_lists")))
        assert -1 <= one["ari"] <= 1 and -1 <= one["stability"] <= 1 and -1 <= one["reliability"] <= 1
    assert measured["groups"]["mean"] == found["directions"]["ari"]


def test_a_run_with_random_groups_and_routing(measured, runs):
    found = measured["test"]
    assert sorted(map(sorted, found["groups"])) == sorted(map(sorted, runs["test"].data.groups("random 1", 0)))
    for task, bits in found["correct"].items():
        right = np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8))
        assert right.sum() / 30 == pytest.approx(found["accuracy"][task])
    assert set(found["routing"]) == {"tasks", "answers", "given"}
    assert found["routing"]["given"] == pytest.approx(found["mean"])


def test_each_task_is_held_out_once(monkeypatch):
    """With four tasks, since eight take a minute."""
    groups = [["print 0", "print 1"], ["photo 0", "photo 1"]]
    domains = {
        name: data for name, data in planted_domains("class_lists", 2, 0).items() if name in [*groups[0], *groups[1]]
    }
    monkeypatch.setattr("benchmark.data.planted_domains", lambda *args: domains)
    monkeypatch.setattr("benchmark.planted_runs.planted_groups", lambda family: groups)
    data = DataSet("planted", family="class_lists", per_class=2)
    found = measure(Run(Experiment("x", "mmap", training=SHORT), data, None, 1, 0, evaluated_on="new_tasks"))
    assert list(found["tasks"]) == [*groups[0], *groups[1]]
    for one in found["tasks"].values():
        assert set(one["accuracy"]) == {"group_0", "group_1", "none"}
        assert one["losses"][one["chosen"]] == min(one["losses"].values())
        assert 0 <= one["probability"] <= 1
    assert [one["family"] for one in found["tasks"].values()] == ["group_0"] * 2 + ["group_1"] * 2


def test_the_report_of_planted_families(study, results, no_pictures):
    label = {"name": "planted", "family": "visual", "label": "visual"}
    made = study(data=[label], seeds=[0], group_seeds=[3, 4], new_task_seeds=[5], names=["mmap"])
    affinity = {"groups": [], "ari": 1.0, "stability": 0.9, "separation": 0.6, "reliability": 0.5}
    for run in made.planted_runs("groups"):
        worse = {**affinity, "ari": 0.5 + 0.5 * (run.seed == 3), "separation": 0.6 - 0.2 * (run.seed != 3)}
        results.append(run, full_result(run, affinities={"cosine": worse, "directions": affinity}))
    for run in made.planted_runs("new_tasks"):
        accuracy = {"group_0": 0.5, "group_1": 0.7, "none": 0.4}
        one = {"chosen": "group_0", "family": "group_0", "probability": 0.9, "accuracy": accuracy}
        results.append(run, full_result(run, tasks={"a": one}))
    lines = "\n".join(planted_lines(made, results.read()))
    assert "| visual | cosine | 2 | 1 | 1 | 0.75 | 0.90 | 0.50 | 0.50 |" in lines
    assert "| visual | directions | 2 | 2 | 2 | 1.00 | 0.90 | 0.60 | 0.50 |" in lines
    assert "| visual | 1 | 1 | 0 | 50.0 | 70.0 | 50.0 | 40.0 | 0.90 |" in lines
    for run in made.runs():
        extra = {"correct": {"print": "ff", "photo": "00"}, "routing": {"tasks": 0.5, "answers": 0.25, "given": 0.75}}
        results.append(run, full_result(run, **extra))
    text = write_report(made, results)
    assert lines in text and "| mmap | 50.0 | 25.0 | 75.0 |" in text


def test_rows_without_routing_have_no_table():
    assert routing_lines([Row(Experiment("one", "mmap"), {0: {"mean": 0.5}})]) == []


def test_the_table_and_the_picture_of_a_ladder(tmp_path):
    def rung(name, mean, step=0.25):
        fields = {"groups": [["a"], ["b"]], "trainable_parameters": 900, "seconds": {"train": 3.0, "step": step}}
        return Row(Experiment(name, "mmap"), {0: {"mean": mean, **fields}, 1: {"mean": mean, **fields}})

    rows = {4: [rung("one", 0.5), rung("groups", 0.6)], 8: [rung("one", 0.55), rung("groups", 0.7)]}
    assert ladder_lines(rows)[-1] == "| 8 | groups | 70.0 | 900 | 2, 2 | 3 | 0.25 |"
    assert ladder_lines({4: [rung("zero_shot", 0.5, None)]})[-1] == "| 4 | zero_shot | 50.0 | 900 | 2, 2 | 3 |  |"
    plot_ladder(rows, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size > 5000

"""Means, intervals, gains and controls, checked by hand; the report and its plot."""

import json
import math

import pytest
from matplotlib.figure import Figure

from benchmark.plots import place_labels, plot_accuracy
from benchmark.report import write_report
from benchmark.results_file import Results
from benchmark.study import Study
from benchmark.summary import Row, gain, grouping_controls, interval

from .conftest import full_result, write_study


def test_interval():
    # t(0.975; 2) = 4.302653, t(0.975; 1) = 12.706205, from tables
    assert interval([0.5, 0.6, 0.7]) == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert interval([0.5, 0.7]) == pytest.approx(12.706205 * 0.1, rel=1e-6)
    assert interval([0.5, 0.5, 0.5]) == 0
    assert interval([0.5]) is None


EXPERIMENTS = {
    "zero_shot": {"method": "zero_shot"},
    "mmap_alone": {"method": "mmap", "tasks": "alone"},
    "mmap": {"method": "mmap"},
    "mmap_none": {"method": "mmap", "training": {"grouping": "none"}},
    "lora": {"method": "lora"},
}
MEANS = {
    "zero_shot": (0.40, 0.40, 0.43),
    "mmap_alone": (0.50, 0.52, 0.54),
    "mmap": (0.60, 0.62, 0.70),
    "mmap_none": (0.55, 0.60, 0.65),
    "lora": (0.58, 0.58, 0.58),
}


def fill(results, runs):
    """Append a result of each run."""
    for run in runs:
        fields = {"mean": MEANS[run.experiment.name][run.seed]}
        if run.experiment.method == "zero_shot":
            fields |= {"trainable_parameters": 0, "groups": None, "adapter_bytes": 0, "share_of_base": 0.0, "steps": 0}
            fields["peak_bytes"] = {"step": None, "total": 800_000_000}
            fields |= {"seconds": {"step": None, "train": 0.0, "evaluate": 2.0, "total": 3.0}}
        if run.experiment.name == "mmap":
            fields["groups"] = [["print", "photo"]] if run.seed else [["print"], ["photo"]]
        if run.experiment.method == "lora":
            fields |= {"trainable_parameters": 120_000, "groups": None}
        results.append(run, full_result(run, **fields))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study with all its results, and its report."""
    folder = tmp_path_factory.mktemp("whole")
    study, results = Study.read(write_study(folder, EXPERIMENTS, seeds=[0, 1, 2])), Results(folder / "results" / "s")
    fill(results, study.runs())
    return study, results, write_report(study, results)


def cells(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table(whole):
    text = whole[2]
    half = 4.302653 * math.sqrt((0.04**2 + 0.02**2 + 0.06**2) / 2) / math.sqrt(3)  # of 0.60, 0.62, 0.70 around 0.64
    found = cells(text, "mmap")
    assert found[1:5] == ["5,400", "0.40 %", "54.0", "74.0"]
    assert found[5:7] == [f"64.0 ± {100 * half:.1f}", "54.0"]
    assert found[7] == "+12.0"  # (0.10 + 0.10 + 0.16) / 3
    assert found[8] == "+23.0"  # (0.20 + 0.22 + 0.27) / 3
    assert found[9:] == ["7", "250", "700", "23.8", "3"]
    assert cells(text, "zero_shot")[7:12] == ["", "", "0", "", ""]
    assert cells(text, "mmap_alone")[7] == ""
    assert cells(text, "lora")[5:8] == ["58.0 ± 0.0", "48.0", ""]
    assert "Incomplete" not in text
    assert "* Machine: CPU (x86_64), threads: 1, Linux\n* Versions: torch 2\n* Commit: abc\n" in text


def test_several_amounts_stand_side_by_side(whole, study, results, no_pictures):
    both = study(EXPERIMENTS, seeds=[0, 1, 2], fractions=[0.3, 0.5])
    fill(results, [run for run in both.runs() if run.fraction == 0.3])
    for run in both.runs():
        if run.fraction == 0.5 and run.experiment.name in ("mmap", "zero_shot"):
            results.append(run, full_result(run, mean=0.8))
    overview = write_report(both, results).split("## ")[0]
    assert "| experiment | parameters | pictograms, 30 % | pictograms, 50 % |" in overview
    assert cells(overview, "mmap")[1:] == ["5,400", cells(whole[2], "mmap")[5], "80.0 ± 0.0"]
    assert cells(overview, "lora")[1:] == ["120,000", "58.0 ± 0.0", ""]


def test_the_controls_of_the_grouping(whole):
    text = whole[2]
    table = text.split("### Controls of the grouping of mmap")[1]
    assert cells(table, "gradient")[1] == cells(text, "mmap")[5]
    assert cells(table, "gradient")[3] == "0: print; photo, 1: print + photo, 2: print + photo"
    assert cells(table, "none")[3] == "print; photo"


def test_the_summary_and_the_plot(whole):
    results = whole[1]
    rows = json.loads((results.folder / "summary.json").read_text())["pictograms_30-percent"]
    found = {row["experiment"]: row for row in rows}
    assert found["mmap"]["gain_single_task"] == pytest.approx(0.12)
    assert found["mmap"]["mean"] == pytest.approx(0.64)
    assert found["lora"]["gain_single_task"] is None
    assert (results.folder / "pictograms_30-percent.png").stat().st_size > 10_000


def test_what_is_missing_or_of_other_settings_is_said_and_left_out(study, results, no_pictures):
    filled = study(EXPERIMENTS, seeds=[0, 1, 2])
    fill(results, [run for run in filled.runs() if run.experiment.name != "lora"])
    for run in filled.runs():
        if run.experiment.name == "mmap" and run.seed == 1:
            results.append(run, {**results.read()[run.name], "settings": {**run.settings, "seed": 7}})
    text = write_report(filled, results)
    assert "**Incomplete: 4 of 15 runs have no result.**" in text
    assert "* missing: lora (pictograms, 30 %)\n* of other settings: mmap (pictograms, 30 %)" in text
    assert not any(line.startswith("| lora | 1") for line in text.splitlines())
    assert cells(text, "mmap")[-1] == "2"
    assert cells(text, "mmap")[7] == "+13.0"  # (0.10 + 0.16) / 2, of the seeds that both have


def test_a_study_without_results(study, results):
    with pytest.raises(ValueError, match="holds no result of study 's'; run it first"):
        write_report(study(), results)


def test_a_gain_is_of_the_same_images(whole):
    filled = whole[0]
    rows = [Row(run.experiment, {0: full_result(run)}) for run in filled.runs()[:3]]
    rows[0].results[0]["split"] = "another"
    with pytest.raises(ValueError, match="for seed 0 are of different images"):
        gain(rows[1], rows[0])
    rows[0].results[0] = {**rows[1].results[0], "test_images": "some"}
    assert gain(rows[1], rows[0]) is not None  # results of earlier versions do not say which they were
    rows[1].results[0]["test_images"] = "others"  # of the targets, say
    with pytest.raises(ValueError, match="for seed 0 are of different images"):
        gain(rows[1], rows[0])
    rows[0].results = {5: {}}
    assert gain(rows[1], rows[0]) is None


def test_controls_differ_in_nothing_else(study):
    experiments = {
        "mmap_none": {"method": "mmap", "training": {"grouping": "none"}},
        "mmap": {"method": "mmap"},
        "longer": {"method": "mmap", "training": {"grouping": "all", "num_train_epochs": 9}},
        "other": {"method": "mmap", "config": {"num_prompts": 2}, "training": {"grouping": "all"}},
        "alone": {"method": "mmap", "tasks": "alone"},
    }
    rows = [Row(experiment, {}) for experiment in study(experiments).experiments]
    assert [[row.experiment.name for row in family] for family in grouping_controls(rows)] == [["mmap", "mmap_none"]]


def test_names_in_a_plot_cover_nothing():
    figure = Figure(figsize=(10, 6.5))
    axes = figure.subplots()
    points = [(1000 * 1.2**number, 50 + number % 3) for number in range(20)]
    axes.scatter(*zip(*points))
    axes.set_xscale("log")
    boxes = place_labels(axes, points, 20 * [0.1], [f"experiment_{number}" for number in range(20)])
    assert len(boxes) == 20
    assert not any(boxes[i].overlaps(boxes[j]) for i in range(20) for j in range(i))
    marks = axes.transData.transform([(x, y + half) for x, y in points for half in (-0.1, 0, 0.1)])
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    frame = axes.get_window_extent()
    assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)


@pytest.mark.parametrize("name", ["zero_shot", "lora"])
def test_a_plot_of_one_experiment(whole, tmp_path, name):
    filled = whole[0]
    rows = [Row(run.experiment, {0: full_result(run)}) for run in filled.runs()[:5] if run.experiment.name == name]
    plot_accuracy(rows, name, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_a_plot_names_methods_that_train_nothing(study, tmp_path):
    run = study({"tip_adapter": {"method": "tip_adapter"}}).runs()[0]
    row = Row(run.experiment, {0: {**full_result(run), "trainable_parameters": 0}})
    plot_accuracy([row], "title", tmp_path / "plot.svg")
    assert "<!-- tip_adapter -->" in (tmp_path / "plot.svg").read_text("utf-8")

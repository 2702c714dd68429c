"""What is committed of the studies is what their files say, and the page of results tells the same."""

import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest

from benchmark.cached import cached_text
from benchmark.clustering import clustering_text
from benchmark.growth import growth_text
from benchmark.loading import loading_text
from benchmark.report import write_report
from benchmark.results_file import Results
from benchmark.speed import speed_text
from benchmark.study import Study
from benchmark.tune import apply_choices, choose
from mmap_peft.multitask.grouping import are_stable


ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmark"


def committed(name, tmp_path):
    """A study and a copy of its results."""
    shutil.copytree(BENCHMARK / "results" / name, tmp_path / name)
    return Study.read(BENCHMARK / "studies" / f"{name}.yaml"), Results(tmp_path / name)


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "results.md").read_text()


PROTOCOLS = ("base_to_new", "cross_dataset", "leave_one_domain_out", "forgetting")


@pytest.mark.parametrize(
    "name", ["pictograms", "reviewers", "five_seeds", "planted", "stability", "ladder", "few_shot", *PROTOCOLS]
)
def test_the_report(name, tmp_path, no_pictures):
    study, results = committed(name, tmp_path)
    study, untuned = apply_choices(study, results)
    text = write_report(study, results, untuned)
    assert text == (BENCHMARK / "results" / name / "report.md").read_text()
    assert "Incomplete" not in text


@pytest.mark.parametrize("name", ["pictograms", "reviewers", "five_seeds", "few_shot"])
def test_the_methods_on_the_page(name, page):
    text = (BENCHMARK / "results" / name / "report.md").read_text()
    assert text[text.index("| experiment | parameters") :].partition("\n\n")[0] in page


def test_the_winners_on_the_page(page):
    """The most accurate method of both studies with up to so many parameters."""
    rows = {}
    for study in ("pictograms", "reviewers"):
        summary = json.loads((BENCHMARK / "results" / study / "summary.json").read_text())
        for place, some in summary.items():
            rows.setdefault(place, []).extend(some)
    lines = page[page.index("| parameters | at 10 %") :].partition("\n\n")[0].splitlines()[2:]
    for line, bound in zip(lines, (0, 1_000, 4_000, 8_000, 20_000, 40_000, 100_000, 10**9), strict=True):
        best = [
            max((row for row in some if row["trainable_parameters"] <= bound), key=lambda row: row["mean"])
            for some in rows.values()
        ]
        cells = [cell for row in best for cell in (row["experiment"], f"{100 * row['mean']:.1f}")]
        assert line.split(" | ")[1:] == [*cells[:-1], f"{cells[-1]} |"]


def test_the_variants_on_the_page(tmp_path, page):
    study, results = committed("variants", tmp_path)
    lines = results.read()
    means = {}
    for one in study.experiments:
        (runs,) = study.validation_runs(one)
        means[one.name.removeprefix("variant_")] = [100 * lines[run.name]["mean"] for run in runs]
    rows = [
        line.strip("| ").split(" | ") for line in page[page.index("| variant |") :].partition("\n\n")[0].split("\n")
    ]
    assert rows[2] == ["plain", f"{fmean(means['plain']):.1f}"]
    for name, mean, difference, better in rows[3:]:
        gains = [one - plain for one, plain in zip(means[name], means["plain"])]
        assert [mean, difference] == [f"{fmean(means[name]):.1f}", f"{fmean(gains):+.1f}"]
        assert better == str(sum(gain > 0 for gain in gains))
    assert {row[0] for row in rows[2:]} == set(means)


COLUMNS = {  # of the table of protocols: study, and the tasks whose mean accuracy is shown; None: the protocol's mean
    "base": ("base_to_new", lambda task: task.endswith("_base")),
    "new": ("base_to_new", lambda task: task.endswith("_new")),
    "harmonic mean": ("base_to_new", None),
    "other classes": ("cross_dataset", lambda task: task.startswith("second_half_")),
    "other looks": ("cross_dataset", lambda task: task.startswith("visual_")),
    "left out": ("leave_one_domain_out", None),
    "untrained": ("forgetting", lambda task: task.startswith("second_half_") and not task.endswith("_base")),
    "untrained, base": ("forgetting", lambda task: task.endswith("_base")),
}


def protocol_lines():
    """The table of protocols on the page of results."""
    cells, experiments = {}, {}
    for column, (study, chosen) in COLUMNS.items():
        (rows,) = json.loads((BENCHMARK / "results" / study / "summary.json").read_text()).values()
        for row in rows:
            name, accuracies = row["experiment"], row["accuracy"].items()
            found = [value for task, value in accuracies if chosen and chosen(task)]
            experiments.setdefault(name, row["trainable_parameters"])
            value = fmean(found) if found else row["mean"] if chosen is None else None
            cells[name, column] = "" if value is None else f"{100 * value:.1f}"
    yield f"| experiment | parameters | {' | '.join(COLUMNS)} |"
    for name, size in experiments.items():
        yield f"| {name} | {size:,} | {' | '.join(cells.get((name, column), '') for column in COLUMNS)} |"


def test_the_protocols_on_the_page(page):
    head, *rows = protocol_lines()
    assert "\n".join([head, "|---|" + "---:|" * (len(COLUMNS) + 1), *rows]) in page


def test_the_groups_on_the_page(tmp_path, page):
    """The table of families: how often they were found, and mean accuracies."""
    study, results = committed("planted", tmp_path)
    lines = results.read()
    groups = [(run, lines[run.name]["affinities"]) for run in study.planted_runs("groups")]
    rows = [line.split("|")[2:-1] for line in page[page.index("| families | found") :].splitlines()[2:6]]
    assert len(rows) == len(study.data)

    def mean(data, *names):
        runs = [run for run in study.runs() if run.experiment.name in names and run.data == data]
        return f"{100 * fmean(lines[run.name]['mean'] for run in runs):.1f}"

    for data, row in zip(study.data, rows):
        of_data = [found for run, found in groups if run.data == data]
        directions = [each["directions"] for each in of_data]
        found = sum(each["ari"] == 1 for each in directions), sum(each["cosine"]["ari"] == 1 for each in of_data)
        used = sum(are_stable(each["stability"], each["separation"]) for each in directions)
        counts = ["", ""] if data.family == "none" else list(map(str, found))

        controls = [mean(data, "planted_gradient"), mean(data, "planted_all"), mean(data, "planted_none")]
        expected = [*counts, str(used), *controls, mean(data, "planted_random_1", "planted_random_2")]
        assert [cell.strip() for cell in row] == expected


def test_the_choices(tmp_path):
    for name in ("pictograms", "reviewers", "five_seeds", "variants", "ablations", "first_layer", "cache_dtype"):
        study, results = committed(name, tmp_path)
        assert set(choose(study, results)) == {one.name for one in study.experiments if one.grid}
        for file in ("choices.json", "choices.md"):
            assert (tmp_path / name / file).read_text() == (BENCHMARK / "results" / name / file).read_text()


def test_speed(page):
    folder = BENCHMARK / "results" / "speed"
    texts = {"speed": speed_text, "growth": growth_text, "loading": loading_text, "cached": cached_text}
    for name, text in texts.items():
        assert text(json.loads((folder / f"{name}.json").read_text())) == (folder / f"{name}.md").read_text()
    training, prediction = (folder / "speed.md").read_text().split("## Prediction")
    for part, head in (
        (training, "batch"),
        (prediction, "batch"),
        ((folder / "cached.md").read_text(), "time / floor"),
    ):
        ratios = part[part.index(f"| {head} |") :].partition("\n\n")[0]
        assert ratios in page


def test_clustering():
    folder = BENCHMARK / "results" / "clustering"
    text = clustering_text(json.loads((folder / "clustering.json").read_text()))
    assert text == (folder / "clustering.md").read_text()

"""The suites of the benchmark: their files, a study on local copies, and what was published."""

import sys
from pathlib import Path

import datasets
import pytest
import yaml
from transformers import CLIPConfig, CLIPModel

from benchmark import references
from benchmark.__main__ import main
from benchmark.data import DataSet
from benchmark.experiment import Experiment
from benchmark.measure import measure
from benchmark.references import Reference, read_references
from benchmark.report import write_report
from benchmark.results_file import Results
from benchmark.run import Run
from benchmark.study import Study
from benchmark.suite_files import SUITES, read_suite
from mmap_peft import Task, load_processor
from mmap_peft.data.pictograms import small_clip

from ..data.suite_copies import write_copy
from .conftest import full_result, write_study


EIGHT = ["sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
STUDY = SUITES.parent / "studies" / "eight_tasks.yaml"
MODEL = "openai/clip-vit-base-patch32"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(("name", "count"), [("eight", 8), ("fourteen", 14), ("twenty", 20)])
def test_a_larger_suite_begins_with_the_smaller(name, count):
    suite = read_suite(f"{name}_tasks")
    assert len(suite.tasks) == count
    assert [task.name for task in suite.tasks[:8]] == EIGHT
    assert all(task.path for task in suite.tasks)
    assert len(yaml.safe_load((SUITES / f"{name}_tasks.yaml").read_text())["tasks"]) == (8 if count == 8 else 6)


def test_the_suites_of_coop_and_of_merging_differ_in_templates_only_where_they_share_images():
    eleven = {task.name: task for task in read_suite("coop_eleven").tasks}
    assert len(eleven) == 11
    twenty = {task.name: task for task in read_suite("twenty_tasks").tasks}
    shared = set(eleven) & set(twenty)
    assert shared == {"sun397", "cars", "eurosat", "dtd", "flowers102", "pets", "food101"}
    assert all(eleven[name].path == twenty[name].path and eleven[name].test == twenty[name].test for name in shared)
    assert eleven["dtd"].template == "{} texture."


def test_names_that_are_listed_fit_the_templates():
    for task in read_suite("twenty_tasks").tasks:
        if task.class_names:
            texts = [
                text for texts in Task(task.name, task.class_names, template=task.template).texts for text in texts
            ]
            assert len(set(texts)) == len(texts)


BAD_FILES = [
    ("tasks: {a: {template: '{}'}, b: {template: '{}', images: x}}", "task 'b' in .* has images, which is no field"),
    ("tasks: {a: {path: me/a}}", "task 'a' in .* lacks template"),
    ("tasks: {a: {template: photo}}", "must hold {} once"),
    ("tasks: [a]", r"tasks in .* is \['a'\]; write fields"),
    ("tasks: {a: b}", "Task 'a' in .* is 'b'; write fields"),
    ("suite: {a: {template: '{}'}}", "has the fields suite; write tasks"),
    ("{extends: eight_tasks, tasks: {dtd: {template: '{}'}}}", "Task 'dtd' in .* is in the suite that it extends"),
    ("{extends: s.yaml, tasks: {a: {template: '{}'}}}", "extends itself"),
    (
        "{extends: nine_tasks, tasks: {a: {template: '{}'}}}",
        "no suite 'nine_tasks'; write one of coop_eleven, eight",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), BAD_FILES)
def test_bad_files(text, sentence, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_suite(str(tmp_path / "s.yaml"))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"suite": "seven_tasks"}, "There is no suite 'seven_tasks'"),
        ({"suite": "../secrets"}, "Suite '../secrets' is to name files"),
        ({}, "Suite None is to name files"),
        ({"suite": "eight_tasks", "split_dir": "lists"}, "was given split_dir; it takes at_most, path, suite"),
    ],
)
def test_bad_suites_of_a_study(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataSet("suite", **fields)


def test_a_suite_beside_its_study(tmp_path):
    own = write_study(tmp_path, data=[{"name": "suite", "suite": "own.yaml"}])
    text = "{extends: eight_tasks, tasks: {more: {template: 'a {}.'}}}"
    (own.parent / "own.yaml").write_text(text)
    settings = Study.read(own).runs()[0].settings["data"]
    assert (settings["suite"], settings["label"]) == ("own", "own") and str(tmp_path) not in str(settings)
    (own.parent / "own.yaml").write_text(text.replace("a {}.", "the {}."))
    assert Study.read(own).runs()[0].settings["data"] != settings  # other texts, other results


@pytest.fixture
def copies(tmp_path):
    """The eight data sets with two or ten classes, a few images of eight pixels, and their features."""
    digits = [str(digit) for digit in range(10)]
    names = {"sun397": ["abbey", "airplane cabin"], "cars": ["Audi V8 Sedan 1994", "Geo Metro Convertible 1993"]}
    names |= {"eurosat": read_suite("eight_tasks").tasks[3].class_names, "svhn": digits, "mnist": digits}
    for task in EIGHT:
        known = names.get(task, ["stop", "polka-dotted"])
        write_copy(tmp_path / "copies" / task, 4 * [0, 1], [1, 0, 1], known)
    return tmp_path / "copies"


@pytest.fixture
def long_clip(tmp_path):
    """The small CLIP, untrained, with room for the texts of GTSRB, which its tokenizer writes letter by letter."""
    config = CLIPConfig.from_pretrained(small_clip())
    config.text_config.max_position_embeddings = 200
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    load_processor(small_clip()).save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


@pytest.mark.parametrize("method", ["zero_shot", "linear_probe", "mmap"])
def test_a_run_on_copies(method, copies, long_clip):
    short = {"max_steps": 1, "per_device_train_batch_size": 8, "grouping_steps": 1, "grouping_snapshots": 1}
    experiment = Experiment(method, method, training=short if method == "mmap" else {"max_steps": 1})
    data = DataSet("suite", str(copies), suite="eight_tasks")
    for amount, evaluated_on in (((None, 2), "test"), ((1.0, None), "validation")):
        found = measure(Run(experiment, data, *amount, 0, long_clip, evaluated_on=evaluated_on))
        assert list(found["accuracy"]) == EIGHT
        assert found["settings"]["data"]["suite"] == "eight_tasks"
        if method != "linear_probe":
            break


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    return main()


def test_without_the_hub_the_study_ends_with_one_sentence(monkeypatch, tmp_path, capsys):
    assert call(monkeypatch, "run", STUDY, "--results", tmp_path) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("Split 'train' of 'tanganke/sun397' for task 'sun397' cannot be read (Couldn't reach")
    assert not list(tmp_path.rglob("*.jsonl"))


def test_the_study_on_copies(monkeypatch, tmp_path, copies, fake, capsys):
    """The study's own file with another path: all its runs are started."""
    fake()
    monkeypatch.setenv("SETTINGS", "{}")
    values = yaml.safe_load(STUDY.read_text())
    values["data"][0]["path"] = str(copies)
    (copies.parent / "experiments").symlink_to(SUITES.parent / "experiments")
    own = copies.parent / "studies" / "own.yaml"
    own.parent.mkdir()
    own.write_text(yaml.safe_dump({**values, "seeds": [0], "shots": [2]}))
    assert call(monkeypatch, "run", own, "--results", tmp_path / "results", "--workers", 2) == 1  # it makes no results
    runs = len(Study.read(own).runs())
    assert f"0 of {runs} runs have their result; {runs} to run." in capsys.readouterr().out
    copies.rename(tmp_path / "moved")
    assert call(monkeypatch, "run", own, "--results", tmp_path / "results") == 2
    assert "is no folder; write one that has a folder for each task" in capsys.readouterr().err


def test_published_means_are_those_of_the_tasks():
    """What was typed agrees with itself: a published mean is that of the tasks in the same row, up to rounding."""
    rows = [(one, row) for one in read_references() for row in one.rows.values() if len(row) > 1]
    for one, row in rows:
        assert set(one.columns) - {"mean"} <= {task.name for task in read_suite(one.suite).tasks}
        if one.columns[-1] == "mean":
            assert sum(row[:-1]) / len(row[:-1]) == pytest.approx(row[-1], abs=0.11)
    assert len(rows) > 15
    for one in read_references():
        assert "arXiv:" in one.source and (SUITES / f"{one.suite}.yaml").exists()


def test_what_is_published_is_reported_for_the_same_model_and_suite_only(tmp_path, no_pictures):
    data = [{"name": "suite", "suite": "eight_tasks"}, {"name": "pictograms", "per_class": 3}]
    for model, there in ((MODEL, True), ("small_clip", False), ("other/clip-vit-base-patch32", False)):
        study = Study.read(write_study(tmp_path, data=data, model=model, seeds=[0]))
        results = Results(tmp_path / "results" / model)
        for run in study.runs():
            tasks = EIGHT if run.data.suite else ["print", "photo"]
            results.append(run, full_result(run, accuracy=dict.fromkeys(tasks, 0.5)))
        text = write_report(study, results)
        assert text.count("eight_tasks, as published") == there
        if there:
            assert text.index("## eight_tasks, 30 %") < text.index("as published") < text.index("## Settings")
            assert "| task arithmetic | 57.1 | 55.7 | 64.9 | 76.7 | 77.9 | 68.5 | 96.1 | 47.2 | 68.0 | 1 |" in text
            assert "| CART |  |  |  |  |  |  |  |  | 84.7 | 2 |" in text
            assert "1. FusionBench (Tang et al., 2024, arXiv:2406.03280)" in text


def test_a_reference_has_a_value_in_percent_for_each_column(monkeypatch, tmp_path):
    for values in ([50.0], [50.0, 0.6, 40.0], [50.0, 500.0]):
        with pytest.raises(ValueError, match="write an accuracy in % for each of dtd, mean"):
            Reference("eight_tasks", MODEL, "someone", ["dtd", "mean"], {"zero-shot": values})
    monkeypatch.setattr(references, "FILE", Path(tmp_path, "r.yaml"))
    references.FILE.write_text("references: [{suite: eight_tasks, model: m, columns: [dtd], rows: {a: [1.0]}}]")
    with pytest.raises(ValueError, match="lacks source"):
        read_references()

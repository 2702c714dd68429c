"""What YAML files may hold, and the sentences for what they may not."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from benchmark.experiment import METHODS, Experiment
from benchmark.reading import build, read_yaml
from benchmark.run import Run
from benchmark.study import Study
from benchmark.suite_files import read_suite


ROOT = Path(__file__).parents[2] / "benchmark"


def test_runs_of_a_study(study):
    two = study(fractions=[0.1], shots=[4], seeds=[0, 1])
    names = [run.name for run in two.runs()]
    assert len(set(names)) == 12
    assert names[0] == "pictograms_10-percent/zero_shot_seed-0"
    assert names[-1] == "pictograms_4-shots/lora_seed-1"
    assert str(two.runs()[-1]) == "lora, pictograms, 4 shots, seed 1"


def test_a_run_as_json_and_back(study):
    for run in study(shots=[2]).runs():
        assert Run.from_dict(asdict(run)) == run


def test_settings_of_the_study_stand_over_those_of_experiments(study):
    run = study(training={"learning_rate": 0.5, "max_steps": 2}).runs()[2]
    assert run.experiment.training == {"learning_rate": 0.5, "max_steps": 2}
    assert run.experiment.arguments().max_steps == 2


def test_places_on_the_machine_are_no_settings(study_file, tmp_path):
    found = []
    for place in ("here", "there"):
        (tmp_path / place / "clip").mkdir(parents=True)
        data = [{"name": "folder", "path": str(tmp_path / place)}]
        found.append(Study.read(study_file(data=data, model=str(tmp_path / place / "clip"))).runs()[0].settings)
    assert found[0] == found[1]
    assert str(tmp_path) not in str(found)


BAD_EXPERIMENTS = [
    ({"method": "adapters"}, "has method 'adapters'; write one of zero_shot, mmap"),
    ({}, "lacks method; write a line for each"),
    ({"method": "mmap", "lr": 1}, "has lr, which is no field; the fields are name, method"),
    ({"method": "mmap", "training": {"lr": 1}}, "'lr' in training of experiment 'bad' is no training argument"),
    ({"method": "mmap", "training": {"seed": 1}}, "'seed' in training .* is set by the benchmark"),
    ({"method": "mmap", "training": {"load_best_model_at_end": True}}, "is set by the benchmark"),
    ({"method": "mmap", "training": {"grouping": "best"}}, "cannot be run: grouping='best' is no choice"),
    ({"method": "mmap", "config": {"num_prompts": 3}}, "cannot be run: Invalid value: source_shape"),
    ({"method": "mmap", "config": {"prompts": 3}}, "cannot be run: .*unexpected keyword argument 'prompts'"),
    ({"method": "zero_shot", "config": {"num_prompts": 3}}, "zero_shot has no settings"),
    ({"method": "mmap", "config": [1]}, "config of experiment 'bad' is \\[1\\]; write fields"),
    ({"method": "mmap", "tasks": "both"}, "write 'together', 'alone' or 'merged'"),
    ({"method": "mmap", "tasks": "merged"}, "merges mmap; write method lora or clip_lora"),
    ({"method": "lora", "merging": {"alpha": 0.5}}, "has merging and method lora; write method full_fine_tuning"),
    ({"method": "bitfit", "merging": {"density": 1.0}}, "'density' in merging .* none of its fields; write alpha"),
    ({"method": "lora", "tasks": "merged", "merging": {"alpha": 0.5}}, "write density, weights, rank"),
    ({"method": "bitfit", "merging": {"alpha": 2}}, "for `alpha`: expected a finite number from 0 to 1"),
    ({"method": "bitfit", "grid": {"merging.alpha": [0.5, 2]}}, "for `alpha`: expected a finite number from 0 to 1"),
    ({"method": "lora", "tasks": "merged", "merging": {"weights": 0}}, "for `weights`"),
    ({"method": "lora", "tasks": "merged", "training": {"sharing": "all"}}, "sharing has no meaning"),
    ({"method": "lora", "steps_per_shot": 0}, "for `steps_per_shot`"),
    ({"method": "mmap", "tasks": "alone", "training": {"grouping": "all"}}, "grouping has no meaning"),
    ({"method": "mmap", "grid": {"learning_rate": [1]}}, "write lists, such as `training.learning_rate"),
    ({"method": "mmap", "grid": {"training.learning_rate": 0.1}}, "write lists, such as"),
    ({"method": "mmap", "grid": {"training.lr": [0.1]}}, "'lr' in training .* is no training argument"),
    ({"method": "mmap", "grid": {"training.learning_rate": [0.1]}, "chosen_as": "lora"}, "write one of the two"),
]


@pytest.mark.parametrize(("values", "sentence"), BAD_EXPERIMENTS)
def test_bad_experiments(values, sentence, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=sentence):
        build(Experiment, {"name": "bad", **read_yaml(path)}, path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("method: [", "cannot be read as YAML"),
        ("- method", "What .* holds is \\['method'\\]; write fields"),
        ("method: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("method: mmap\ntraining:\n  learning_rate: 1e-3", "holds 1e-3, which is a text in YAML; write 0.001"),
    ],
)
def test_bad_yaml(text, sentence, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_yaml(path)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"fractions": []}, "does not say how many images train"),
        ({"fractions": [1.5]}, "fractions of study 's' has 1.5; write numbers between 0 and 1"),
        ({"shots": [0]}, "shots of study 's' has 0; write whole numbers of 1 or more"),
        ({"seeds": [True]}, "seeds of study 's' has True"),
        ({"seeds": 3}, "seeds of study 's' is 3; write a list"),
        ({"name": "../s"}, "Study '../s' is to name files"),
        ({"data": []}, "data of study 's' is \\[\\]; write a list"),
        ({"data": "pictograms"}, "data in .* is 'pictograms'; write a list"),
        ({"data": ["pictograms"]}, "An entry of data in .* is 'pictograms'"),
        ({"data": [{"name": "imagenet"}]}, "'imagenet' is no data set of a study; write one of pictograms"),
        ({"data": [{"name": "folder"}]}, "has no path; write its folder, or its name on the Hub"),
        ({"data": [{"name": "pictograms", "path": "x"}]}, "was given path; it takes classes, per_class"),
        ({"data": [{"name": "pictograms", "per_class": 1}]}, "per_class .* is 1; write a whole number of 2"),
        ({"data": [{"name": "pictograms", "label": "a/b"}]}, "Label 'a/b' is to name files"),
        ({"data": 2 * [{"name": "pictograms"}]}, "has data of the same name"),
        ({"names": ["mmap", "mmap"]}, "has experiments of the same name"),
        ({"names": ["../../secrets"]}, "is to name files"),
        ({"names": ["unknown"]}, "unknown.yaml cannot be read"),
        ({"training": {"lr": 1}}, "'lr' in training .* is no training argument"),
        ({"reference": "unknown"}, "reference of study 's' is 'unknown', which is none of its experiments"),
    ],
)
def test_bad_studies(fields, sentence, study_file):
    with pytest.raises(ValueError, match=sentence):
        Study.read(study_file(**fields))


SHIPPED = sorted((ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments(path):
    build(Experiment, {"name": path.stem, **read_yaml(path)}, path)


def test_the_studies_have_every_experiment_and_two_of_them_every_method():
    names = ("pictograms", "reviewers", "ablations", "first_layer", "cache_dtype", "planted", "ladder")
    large, reviewers, *others = (Study.read(ROOT / "studies" / f"{name}.yaml") for name in names)
    experiments = [one for study in (large, reviewers, *others) for one in study.experiments]
    assert sorted({one.name for one in experiments}) == [path.stem for path in SHIPPED]
    assert {one.method for one in large.experiments + reviewers.experiments} == set(METHODS)


def test_the_page_on_the_benchmark(tmp_path, monkeypatch):
    page = (ROOT.parent / "docs" / "benchmark.md").read_text()
    experiment, study, suite, domains = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    domains += "name: domains\nexperiments: [mmap_long]\n"
    files = {"experiments/mmap_long": experiment, "studies/mine": study, "studies/birds": suite}
    for name, text in {**files, "studies/domains": domains}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    for path in SHIPPED:
        shutil.copy(path, tmp_path / "experiments")
    found = Study.read(tmp_path / "studies" / "mine.yaml")
    assert "mmap_long" in [one.name for one in found.experiments]
    assert Study.read(tmp_path / "studies" / "domains.yaml").data[0].name == "office_home"
    tasks = read_suite(str(tmp_path / "studies" / "birds.yaml")).tasks
    assert len(tasks) == 9
    for field in vars(tasks[-1]):
        assert f"`{field}`" in page
    for field in (*vars(found.experiments[0]), *vars(found), *vars(found.data[0])):
        assert f"`{field}`" in page


def test_the_study_of_variants_has_every_variant():
    study = Study.read(ROOT / "studies" / "variants.yaml")
    assert sorted(one.name for one in study.experiments) == [
        path.stem for path in sorted((ROOT / "experiments" / "variants").glob("*.yaml"))
    ]
    assert {one.method for one in study.experiments} == {"mmap"}

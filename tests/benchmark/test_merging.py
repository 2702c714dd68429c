"""Runs whose adapters are merged after training: TIES of LoRA, WiSE-FT, and the steps of CLIP-LoRA."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmark.data import DataSet
from benchmark.experiment import Experiment
from benchmark.measure import measure
from benchmark.reading import build, read_yaml
from benchmark.run import Run
from benchmark.study import Study
from mmap_peft import clip_lora_arguments
from mmap_peft.data.pictograms import draw


SHORT = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01}
STYLES, CLASSES, IMAGES = ("print", "photo"), ("sun", "star", "cat"), 8
ROOT = Path(__file__).parents[2] / "benchmark"


@pytest.fixture
def make_run(tmp_path, clip_folder):
    """Makes a run on domains of three classes of eight images each, half of which train."""

    def make(method, styles=STYLES, **fields):
        folder = tmp_path / "-".join(styles)
        for style in styles if not folder.exists() else ():
            for name in CLASSES:
                (folder / style / name).mkdir(parents=True)
                for number in range(IMAGES):
                    draw(style, name, number).save(folder / style / name / f"{number}.png")
        experiment = Experiment("e", method, **{"training": SHORT, **fields})
        return Run(experiment, DataSet("folder", str(folder)), 0.5, None, 0, clip_folder)

    return make


def test_merging_a_single_task_untrimmed_changes_nothing(make_run):
    one = {"styles": ("print",), "config": {"r": 2}}
    alone = measure(make_run("lora", tasks="alone", **one))
    merged = measure(make_run("lora", tasks="merged", merging={"density": 1.0}, **one))
    assert alone["correct"] == merged["correct"]
    assert alone["steps"] == merged["steps"] == 2
    assert alone["trainable_parameters"] == merged["trainable_parameters"] > 0
    trimmed = measure(make_run("lora", tasks="merged", merging={"density": 0.01}, **one))
    assert trimmed["settings"]["experiment"]["merging"] == {"density": 0.01}


def test_a_merged_adapter_serves_all_tasks_and_was_trained_on_each_alone(make_run):
    alone = measure(make_run("clip_lora", tasks="alone"))
    run = make_run("clip_lora", tasks="merged", merging={"weights": 1.5})
    merged = measure(run)
    assert list(merged["accuracy"]) == list(alone["accuracy"]) and len(merged["accuracy"]) == 2
    assert merged["split"] == alone["split"]
    assert merged["steps"] == alone["steps"] == 4
    assert merged["trainable_parameters"] == alone["trainable_parameters"]
    again = measure(run)
    assert again["correct"] == merged["correct"]
    assert 0 < merged["seconds"]["train"] < merged["seconds"]["total"]


def test_the_ends_of_wise_ft_are_the_training_and_zero_shot(make_run):
    found = {alpha: measure(make_run("bitfit", merging={"alpha": alpha})) for alpha in (0.0, 1.0)}
    assert found[1.0]["correct"] == measure(make_run("bitfit"))["correct"]
    assert found[0.0]["correct"] == measure(make_run("zero_shot"))["correct"]
    assert found[0.0]["trainable_parameters"] == found[1.0]["trainable_parameters"] > 0


def test_alpha_is_chosen_without_a_test_image(make_run):
    run = make_run("bitfit", merging={"alpha": 0.5})
    _, split = run.data.read(0.5, None, 0)
    for file in [file for files in split.eval.values() for file in files]:
        Path(run.data.path, file).write_bytes(b"no image")
    assert measure(replace(run, evaluated_on="validation"))["settings"]["experiment"]["merging"] == {"alpha": 0.5}


def test_steps_for_each_shot(make_run):
    training = {name: value for name, value in SHORT.items() if name != "max_steps"}
    run = make_run("bitfit", styles=("print",), training=training, steps_per_shot=2)
    assert measure(run)["steps"] == 2 * IMAGES / 2
    assert measure(replace(run, fraction=None, shots=1))["steps"] == 2
    half = replace(run, data=DataSet("pictograms", per_class=3, classes=[0, 4]), fraction=None, shots=2)
    assert measure(replace(half, protocol="base_to_new"))["steps"] == 4  # of the classes that train
    limited = replace(run.experiment, training=SHORT)  # as by the `training` of a study
    assert measure(replace(run, experiment=limited))["steps"] == 2


def test_the_experiment_of_clip_lora_has_the_settings_of_its_recipe():
    path = ROOT / "experiments" / "clip_lora.yaml"
    experiment = build(Experiment, {"name": path.stem, **read_yaml(path)}, path)
    recipe = clip_lora_arguments(shots=4)
    assert experiment.steps_per_shot * 4 == recipe.pop("max_steps")
    args = experiment.arguments()
    assert {name: getattr(args, name) for name in recipe} == recipe


def test_the_study_of_reviewers_has_the_images_of_the_large_one():
    reviewers, large = (Study.read(ROOT / "studies" / f"{name}.yaml") for name in ("reviewers", "pictograms"))
    for field in ("data", "fractions", "shots", "tune_fractions", "model"):
        assert getattr(reviewers, field) == getattr(large, field)
    chosen = {one.name: list(one.grid) for one in reviewers.experiments if one.merging}
    assert chosen == {"wise_ft": ["merging.alpha"], "ties_lora": ["merging.density", "merging.weights"]}

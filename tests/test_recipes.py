"""The files under examples/recipes load, and hold the values that their sources have."""

from pathlib import Path

import pytest
import yaml

from benchmark.experiment import Experiment
from benchmark.reading import build
from benchmark.run import PROTOCOLS
from benchmark.study import Study


FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
FILES = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.yaml"))}
STUDIES = [name for name, values in FILES.items() if "experiments" in values]
METHODS = [name for name in FILES if name not in STUDIES]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_loads_and_each_experiment_makes_config_and_arguments(name, tmp_path):
    study = Study.read(FOLDER / f"{name}.yaml")
    assert study.name == name
    assert name.startswith(study.data[0].name)
    for experiment in study.experiments:
        args = experiment.arguments(output_dir=str(tmp_path), use_cpu=True)
        assert (args.augmentation is None) == (experiment.method == "zero_shot")
        assert (experiment.peft_config() is None) == (experiment.method == "zero_shot")
        epochs = FILES[experiment.name].get("training", {}).get("num_train_epochs", 1)
        assert args.get_warmup_steps(epochs * 100) in (0, 100)  # one epoch
    assert study.runs()


def test_every_method_is_part_of_a_study_of_each_data_set():
    for data in ("office_home", "mini_domainnet"):
        used = {path for name in STUDIES if name.startswith(data) for path in FILES[name]["experiments"]}
        assert used == {f"{name}.yaml" for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_source_and_what_is_ours(name):
    text = (FOLDER / f"{name}.yaml").read_text("utf-8")
    assert name == "zero_shot" or ("# Source: " in text and "\n# Ours: " in text)


# Rate, batch, epochs and prompts, as read in the authors' configs.
VALUES = {
    "coop_50_epochs": (0.002, 32, 50, 16),
    "coop_4_prompts_50_epochs": (0.002, 32, 50, 4),
    "coop_4_prompts_200_epochs": (0.002, 32, 200, 4),
    "coop_100_epochs": (0.002, 32, 100, 16),
    "coop_200_epochs": (0.002, 32, 200, 16),
    "vpt": (0.0025, 4, 5, 8),
    "ivlp": (0.0035, 4, 5, 2),
    "ivlp_20_epochs": (0.0025, 4, 20, 4),
    "maple": (0.0035, 4, 5, 2),
    "promptsrc_50_epochs": (0.0025, 4, 50, 4),
    "promptsrc_50_epochs_late": (0.0025, 4, 50, 4),
    "promptsrc_20_epochs": (0.0025, 4, 20, 4),
    "maple_cross_dataset": (0.0026, 4, 2, 2),
    "promptsrc_cross_dataset": (0.0025, 4, 20, 4),
}


def test_values_are_those_of_the_sources():
    names = ("learning_rate", "per_device_train_batch_size", "num_train_epochs")
    found = {
        name: (*(FILES[name]["training"][each] for each in names), FILES[name]["config"]["num_prompts"])
        for name in METHODS
        if name != "zero_shot"
    }
    assert found == VALUES


@pytest.mark.parametrize("data", ["office_home", "mini_domainnet", "suite_coop"])
def test_each_data_set_has_a_recipe_of_each_protocol(data):
    recipes = [Study.read(FOLDER / f"{name}.yaml") for name in STUDIES if name.startswith(data)]
    found = {study.protocol for study in recipes}
    assert found == set(PROTOCOLS) - ({"leave_one_domain_out"} if data == "suite_coop" else set())
    assert {shots for study in recipes if study.protocol == "multi_task" for shots in study.shots} == {1, 2, 4, 8, 16}


@pytest.mark.parametrize(
    ("name", "mean", "std", "depth"),
    [
        ("promptsrc_50_epochs", 30, 30, 9),
        ("promptsrc_50_epochs_late", 45, 5, 9),
        ("promptsrc_20_epochs", 15, 1, 9),
        ("promptsrc_cross_dataset", 6, 10, 3),
    ],
)
def test_the_losses_and_the_gaussian_of_promptsrc(name, mean, std, depth, tmp_path):
    experiment = build(Experiment, {"name": name, **FILES[name]}, name)
    args, config = experiment.arguments(output_dir=str(tmp_path), use_cpu=True), experiment.peft_config()
    assert config.depth == depth and config.num_prompts == 4
    assert args.regularization(config)[:3] == (25, 10, 1)
    epochs = args.num_train_epochs
    assert (args.regularization(config).average_mean * epochs, args.average_std * epochs) == pytest.approx((mean, std))

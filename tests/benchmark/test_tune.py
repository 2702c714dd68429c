"""Choices are made on training images alone, and only for what they were made for."""

import pytest

from benchmark.tune import apply_choices, choose, table

from .conftest import full_result


GRID = {"training.learning_rate": [0.01, 0.03, 0.1]}
EXPERIMENTS = {
    "mmap": {"method": "mmap", "grid": GRID},
    "mmap_none": {"method": "mmap", "training": {"grouping": "none"}, "chosen_as": "mmap"},
    "lora": {"method": "lora", "training": {"learning_rate": 0.002}},
}


@pytest.fixture
def validated(study, results):
    """Makes a study whose validation runs came to these means, a list a point."""

    def make(means, experiments=EXPERIMENTS, **fields):
        whole = study(experiments, tune_seeds=[0, 1], **fields)
        for runs, values in zip(whole.validation_runs(whole.experiments[0]), means):
            for run, mean in zip(runs, values):
                results.append(run, full_result(run, mean))
        return whole

    return make


def test_the_best_mean_is_chosen_and_the_first_of_equals(validated, results):
    study = validated([[0.5, 0.5], [0.4, 0.7], [0.55, 0.55]])
    choices = choose(study, results)
    assert [one["accuracy"] for one in choices["mmap"]["tried"]] == pytest.approx([0.5, 0.55, 0.55])
    assert choices["mmap"]["chosen"] == {"training.learning_rate": 0.03}
    assert "| mmap | **training.learning_rate: 0.03** | 55.0 % |" in table(choices)
    assert table(choices) in (results.folder / "choices.md").read_text()
    chosen, open_ = apply_choices(study, results)
    rates = {one.name: one.training.get("learning_rate") for one in chosen.experiments}
    assert rates == {"mmap": 0.03, "mmap_none": 0.03, "lora": 0.002}
    assert not open_


def test_fractions_of_their_own_choose(study):
    whole = study(EXPERIMENTS, fractions=[0.3, 0.5], shots=[2], tune_fractions=[0.5])
    points = whole.validation_runs(whole.experiments[0])
    assert [[run.fraction for run in runs] for runs in points] == [[0.5]] * 3
    assert {run.fraction for run in whole.runs()} == {0.3, 0.5, None}


def test_nothing_is_chosen_from_half_a_grid(validated, results):
    study = validated([[0.5, 0.5], [0.4]])
    assert choose(study, results) == {}
    assert apply_choices(study, results)[1] == ["mmap", "mmap_none"]


def test_a_choice_for_other_settings_stops_with_a_sentence(validated, results):
    means = [[0.5, 0.5], [0.4, 0.7], [0.6, 0.6]]
    choose(validated(means), results)
    other = {**EXPERIMENTS, "mmap": {"method": "mmap", "config": {"num_prompts": 2}, "grid": GRID}}
    for changed in (validated(means, other), validated(means, fractions=[0.5])):
        with pytest.raises(ValueError, match="a choice for 'mmap' that was made with other settings; run"):
            apply_choices(changed, results)


def test_a_choice_of_nobody(study, results):
    experiments = {name: EXPERIMENTS[name] for name in ("mmap_none", "lora")}
    with pytest.raises(ValueError, match="takes what was chosen for 'mmap', which is no experiment with a grid"):
        apply_choices(study(experiments), results)


def test_validation_and_test_results_have_names_of_their_own(study):
    whole = study(EXPERIMENTS)
    runs = [run for point in whole.validation_runs(whole.experiments[0]) for run in point]
    names = {run.name for run in runs} | {run.name for run in whole.runs()}
    assert len(names) == len(runs) + len(whole.runs()) == 3 + 6
    assert {run.settings["evaluated_on"] for run in runs} == {"validation"}
    assert str(runs[0]) == "mmap, validation, training.learning_rate: 0.01, pictograms, 30 %, seed 0"

"""Base to new classes, across data sets, without one domain: which tasks train, and what is evaluated."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from statistics import fmean, harmonic_mean

import numpy as np
import pytest
from transformers import set_seed

from benchmark import means
from benchmark.data import DataSet
from benchmark.experiment import Experiment
from benchmark.measure import measure
from benchmark.protocols import Target, _texts, evaluated, read_targets, trainings, without_duplicates
from benchmark.run import PROTOCOLS, Run
from benchmark.study import Study
from benchmark.trainers import train
from mmap_peft import (
    CoOpConfig,
    LinearProbeConfig,
    MaPLeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    Task,
    TaskGrouping,
)
from mmap_peft.data.duplicates import find_duplicates
from mmap_peft.data.pictograms import CLASS_NAMES
from mmap_peft.data.splits import Split


SHORT = {"max_steps": 2, "grouping_steps": 1, "grouping_snapshots": 1, "snapshot_images": 2}
SMALL = {**SHORT, "per_device_train_batch_size": 8, "learning_rate": 0.1}
METHODS = {
    "zero_shot": Experiment("zero_shot", "zero_shot"),
    "mmap": Experiment("mmap", "mmap", training={**SMALL, "grouping": "none"}),
    "lora": Experiment("lora", "lora", training=SMALL),
}


def run_of(protocol, method, **fields):
    data = DataSet("pictograms", per_class=2, classes=[0, 5], label="own")
    targets = (DataSet("pictograms", per_class=2, classes=[5, 8], label="other"),) if PROTOCOLS[protocol] else ()
    return Run(METHODS[method], data, None, 1, 0, protocol=protocol, targets=targets, **fields)


def tasks_of(run):
    domains, split = run.data.read(run.fraction, run.shots, run.seed)
    return run.data.make_tasks(split, domains, "a photo of a {}.")


@pytest.mark.parametrize("method", METHODS)
def test_base_to_new(method, tmp_path):
    result = measure(run_of("base_to_new", method))
    accuracy, styles = result["accuracy"], ["print", "clipart", "sketch", "photo"]
    assert list(accuracy) == [f"{style}_{half}" for style in styles for half in ("base", "new")]
    for half in ("base", "new"):
        assert result[half] == pytest.approx(fmean(accuracy[f"{style}_{half}"] for style in styles))
    assert result["mean"] == pytest.approx(harmonic_mean([result["base"], result["new"]]))
    if method == "mmap":  # the trainer's own evaluation, of the same training
        run = run_of("base_to_new", method)
        [training] = trainings(run, tasks_of(run))
        set_seed(0)
        args = run.experiment.arguments(output_dir=str(tmp_path), seed=0)
        metrics = train(run, training.tasks, args).trainer.evaluate()
        for name, value in accuracy.items():
            style, _, half = name.partition("_")
            assert metrics[f"eval_{style}_accuracy_{half}"] == pytest.approx(value)


def test_only_the_first_half_of_the_classes_trains():
    run = run_of("base_to_new", "mmap")
    [training] = trainings(run, tasks_of(run))
    for task in training.tasks:
        assert list(task.trained_classes) == task.class_names[:3]
    alone = replace(run, experiment=Experiment("alone", "mmap", tasks="alone"))
    assert [[task.name for task in one.tasks] for one in trainings(alone, tasks_of(run))] == [
        ["print"], ["clipart"], ["sketch"], ["photo"]
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("protocol", ["cross_dataset", "forgetting"])
def test_other_data_sets(protocol, method):
    result = measure(run_of(protocol, method))
    names = [f"other_{style}" for style in ("print", "clipart", "sketch", "photo")]
    if protocol == "cross_dataset":
        assert list(result["accuracy"]) == names
        return
    after = [f"{name}_base" for name in names]
    assert list(result["accuracy"]) == names + after
    plain = measure(run_of("cross_dataset", "zero_shot"))
    for name, of_base in zip(names, after):  # the base's own row stays as it is
        assert result["correct"][of_base] == plain["correct"][name]
    assert result["base_after_training"] == plain["mean"]
    assert result["mean"] == pytest.approx(np.mean([result["accuracy"][name] for name in names]))
    assert result["worst"] == min(result["accuracy"][name] for name in names)


def test_leave_one_domain_out(clip, processor):
    run = run_of("leave_one_domain_out", "mmap")
    tasks = tasks_of(run)
    made = trainings(run, tasks)
    assert [[task.name for task in one.tasks] for one in made] == [
        [other.name for other in tasks if other is not task] for task in tasks
    ]
    classifier = MultiTaskClassifier(clip, processor, made[0].tasks, MmAPConfig(num_prompts=4, source_shape=(2, 4)))
    classifier.set_grouping(TaskGrouping.by_mode("none", list(classifier.tasks)))
    [table] = made[0].evaluate(classifier).values()
    images = tasks[0].eval[:]["image"]
    found = classifier.predict(images, class_names=tasks[0].class_names)  # the adapters of the tasks that are nearest
    assert table["predicted"].to_pylist() == found.labels
    assert len(set(table["task"].to_pylist())) == 1 and table["task"][0].as_py() == "print"
    assert table["true"].to_pylist() == [tasks[0].class_names[number] for number in tasks[0].labels("eval")]
    np.testing.assert_allclose(table["probability_predicted"], found.probabilities.amax(1), atol=1e-6)


def test_a_run_as_json_and_back():
    run = run_of("cross_dataset", "mmap")
    assert Run.from_dict(asdict(run)) == run
    assert run.settings["targets"][0]["classes"] == [5, 8] and run.settings["protocol"] == "cross_dataset"
    assert "protocol" not in replace(run, protocol="multi_task", targets=()).settings


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"protocol": "base_to_old"}, "protocol of study 's' is 'base_to_old'; write one of multi_task"),
        ({"protocol": "cross_dataset"}, "protocol 'cross_dataset' of study 's' needs targets"),
        (
            {"protocol": "forgetting", "targets": [{"name": "pictograms"}, {"name": "pictograms", "classes": [3, 6]}]},
            "targets of the same name",
        ),
        ({"targets": [{"name": "pictograms"}]}, "protocol 'multi_task' of study 's' takes no targets"),
        ({"targets": "pictograms"}, "targets in .* write a list"),
        ({"data": [{"name": "pictograms", "classes": [3, 4]}]}, r"classes of data set 'pictograms' is \[3, 4\]"),
        ({"data": [{"name": "pictograms", "classes": [0, 61]}]}, "two or more classes of 0 to 60"),
        ({"data": [{"name": "pictograms", "classes": "0-3"}]}, "classes of data set 'pictograms' is '0-3'"),
    ],
)
def test_bad_fields(fields, sentence, study_file):
    with pytest.raises(ValueError, match=sentence):
        Study.read(study_file(**fields))


def test_experiments_alone_are_refused(study_file):
    experiments = {"lone": {"method": "mmap", "tasks": "alone"}}
    with pytest.raises(ValueError, match="'lone' trains each task alone, which protocol 'leave_one_domain_out'"):
        Study.read(study_file(experiments, protocol="leave_one_domain_out"))
    together = Study.read(study_file(experiments, protocol="leave_one_domain_out", tasks="together"))
    assert [one.tasks for one in together.experiments] == ["together"]
    run = replace(run_of("cross_dataset", "mmap"), experiment=Experiment("lone", "mmap", tasks="alone"))
    with pytest.raises(ValueError, match="'lone' trains each of 4 tasks alone, so cross_dataset would not know"):
        trainings(run, tasks_of(run))
    assert len(trainings(run, tasks_of(run)[:1])) == 1  # one task alone is all tasks together


@pytest.mark.parametrize("method", [("linear_probe", {}), ("coop", {"num_classes": 5})])
@pytest.mark.parametrize("protocol", ["base_to_new", "cross_dataset", "leave_one_domain_out"])
def test_parameters_of_each_class_are_refused_before_training_where_classes_are_new(protocol, method):
    run = replace(run_of(protocol, "mmap"), experiment=Experiment("own", method[0], config=method[1]))
    tasks = tasks_of(run)
    if protocol == "leave_one_domain_out":
        assert len(trainings(run, tasks)) == 4  # they have the same classes
        tasks[2] = Task("sketch", tasks[2].class_names[:4])  # images of others may be given to it
    elif protocol == "cross_dataset":
        assert trainings(replace(run, targets=(run.data,)), tasks)
    with pytest.raises(ValueError, match=f"'own' has parameters for each class by itself, but with {protocol} images"):
        trainings(run, tasks)


@pytest.mark.parametrize("classes", [2, 3])
def test_base_to_new_needs_two_classes_in_each_half(classes):
    run = run_of("base_to_new", "mmap")
    run = replace(run, data=replace(run.data, classes=[0, classes]))
    with pytest.raises(ValueError, match=f"'print' has {classes} classes, .* needs two classes or more in each half"):
        trainings(run, tasks_of(run))


def test_a_half_without_test_images_is_refused():
    run = run_of("base_to_new", "mmap")
    tasks = tasks_of(run)
    few = [row for row, label in enumerate(tasks[1].labels("eval")) if label < 3]
    tasks[1] = replace(tasks[1], eval=tasks[1].eval.select(few))
    with pytest.raises(ValueError, match="'clipart' has 5 classes, 3 of them with test images"):
        trainings(run, tasks)


def test_leaving_out_the_only_task_is_refused():
    run = run_of("leave_one_domain_out", "mmap")
    with pytest.raises(ValueError, match="there is one task only; add others"):
        trainings(run, tasks_of(run)[:1])


@pytest.mark.parametrize("names", [("a", "b_c", "a_b", "c"), ("a", "b_base", "d", "e")])
def test_names_of_results_that_could_be_confused_are_refused(names, tmp_path):
    run, targets = run_of("forgetting", "mmap"), []
    domains, split = run.data.read(None, 1, 0)
    for label, domain in (names[:2], names[2:]):
        part = Split({domain: split.train["print"]}, {domain: split.eval["print"]}, {})
        targets.append(Target(replace(run.data, label=label), {domain: domains["print"]}, part))
    with pytest.raises(ValueError, match="give the target another label, or rename its domain"):
        trainings(run, tasks_of(run), targets)


@pytest.mark.parametrize("template", ["{} texture.", "a centered satellite photo of {}."])
@pytest.mark.parametrize("config", [CoOpConfig(), MaPLeConfig(), MmAPConfig()], ids=lambda one: one.peft_type)
def test_a_target_with_templates_of_its_own(config, template, clip, processor):
    """They are used, unless prompts replace words: those then stay the words of the training."""
    run = run_of("forgetting", "mmap")
    tasks, [target] = tasks_of(run), read_targets(run)
    suite = replace(target, data=Templated(target.data, template))
    classifier = MultiTaskClassifier(clip, processor, tasks, config)
    [training] = trainings(run, tasks, [suite])
    tables = training.evaluate(classifier)
    images, classes = target.data.make_tasks(target.split, target.domains, "{}")[0].eval["image"], CLASS_NAMES[5:8]
    for name, plain in ("other_print", False), ("other_print_base", True):
        replaced = not plain and getattr(config, "placeholders", 0)
        templates = None if replaced else template
        with classifier.zero_shot() if plain else nullcontext():
            expected = classifier.predict(images, "print", class_names=classes, templates=templates)
        found = tables[name]["probability_predicted"]
        np.testing.assert_allclose(found, expected.probabilities.amax(1), atol=1e-5)


def test_a_linear_probe_gets_no_templates(clip, processor):
    tasks = tasks_of(run_of("cross_dataset", "mmap"))
    probe = MultiTaskClassifier(clip, processor, tasks, LinearProbeConfig())
    like = Task("like", tasks[0].class_names, template="{} texture.")
    assert _texts(probe, like)["templates"] is None
    with probe.zero_shot():
        assert _texts(probe, like)["templates"] == "{} texture."


def test_tasks_with_several_templates_are_no_reason_to_leave_out_that_of_a_target(clip, processor):
    run = run_of("cross_dataset", "mmap")
    tasks, [target] = tasks_of(run), read_targets(run)
    tasks[3] = replace(tasks[3], template="a satellite view of a {}.")
    classifier = MultiTaskClassifier(clip, processor, tasks, MmAPConfig(num_prompts=4, source_shape=(2, 4)))
    classifier.set_grouping(TaskGrouping.by_mode("none", list(classifier.tasks)))
    [training] = trainings(run, tasks, [target])
    table = training.evaluate(classifier)["other_photo"]
    images = target.data.make_tasks(target.split, target.domains, "{}")[3].eval["image"]
    expected = classifier.predict(images, class_names=CLASS_NAMES[5:8], templates="a photo of a {}.")
    np.testing.assert_allclose(table["probability_predicted"], expected.probabilities.amax(1), atol=1e-5)


@pytest.mark.parametrize("protocol", ["cross_dataset", "forgetting"])
def test_zero_shot_uses_the_templates_of_a_target(protocol, monkeypatch):
    targets = read_targets(run_of(protocol, "zero_shot"))
    suite = [replace(each, data=Templated(each.data, "{} texture.")) for each in targets]
    monkeypatch.setattr("benchmark.measure.read_targets", lambda run: suite)
    seen = []
    predict = MultiTaskClassifier.predict
    monkeypatch.setattr(
        MultiTaskClassifier, "predict", lambda *args, **of: seen.append(of["templates"]) or predict(*args, **of)
    )
    result = measure(run_of(protocol, "zero_shot"))
    assert set(seen) == {"{} texture."}
    if protocol == "forgetting":  # nothing is lost
        assert result["mean"] == result["base_after_training"]


def test_the_worst_task_is_one_of_what_was_trained():
    accuracy = {"a": 0.6, "b": 0.5, "a_base": 0.4, "b_base": 0.3}
    assert means.trained("forgetting", accuracy) == {"a": 0.6, "b": 0.5}
    assert means.trained("base_to_new", accuracy) == accuracy


class Templated:
    """A data set that gives its tasks another template, as a suite does."""

    def __init__(self, data, template):
        self.label, self._data, self._template = data.label, data, template

    def make_tasks(self, split, domains, template):
        return self._data.make_tasks(split, domains, self._template)


@pytest.mark.parametrize("drop", [False, True])
def test_near_duplicates_of_the_test_images_of_targets(drop):
    run = run_of("cross_dataset", "zero_shot")
    same = DataSet("pictograms", per_class=4, classes=[0, 5], label="other", drop_duplicates=drop)
    run = replace(run, data=replace(same, label="own"), targets=(same,), shots=2)
    [target] = read_targets(run)
    domains, split = run.data.read(
        None, 2, 1
    )  # another seed, so that some of its images are test images of the target
    found = sum(map(len, find_duplicates(*evaluated(domains, split, [target])).values()))
    assert found > 10
    clean = without_duplicates(run, domains, split, [target])
    assert sum(map(len, clean.train.values())) == 40 - found * drop
    left = find_duplicates(*evaluated(domains, clean, [target]))
    assert sum(map(len, left.values())) == found * (not drop)
    assert clean.eval == split.eval and list(clean.train) == list(split.train)


def test_results_say_which_images_of_the_targets_are_test_images():
    run = run_of("cross_dataset", "zero_shot")
    results = [measure(run), measure(replace(run, targets=(replace(run.targets[0], classes=[5, 9]),)))]
    assert results[0]["test_images"] != results[1]["test_images"]
    assert results[0]["duplicates"] == {"found": 0, "dropped": 0}


def test_validation_runs_have_no_protocol(study):
    experiments = {"mmap": {"method": "mmap", "grid": {"training.learning_rate": [0.01]}}}
    made = study(experiments, protocol="base_to_new")
    [[run, *_]] = made.validation_runs(made.experiments[0])
    assert run.protocol == "multi_task" and made.runs()[0].protocol == "base_to_new"

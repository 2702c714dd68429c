"""Base to new classes, across data sets, without one domain: which tasks train, and what is evaluated."""

from dataclasses import asdict, replace
from statistics import fmean, harmonic_mean

import numpy as np
import pytest
from transformers import set_seed

from benchmark.data import DataSet
from benchmark.experiment import Experiment
from benchmark.measure import measure
from benchmark.protocols import trainings
from benchmark.run import PROTOCOLS, Run
from benchmark.study import Study
from benchmark.trainers import train
from mmap_peft import MmAPConfig, MultiTaskClassifier, TaskGrouping


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


def test_validation_runs_have_no_protocol(study):
    experiments = {"mmap": {"method": "mmap", "grid": {"training.learning_rate": [0.01]}}}
    made = study(experiments, protocol="base_to_new")
    [[run, *_]] = made.validation_runs(made.experiments[0])
    assert run.protocol == "multi_task" and made.runs()[0].protocol == "base_to_new"

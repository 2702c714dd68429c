"""Real runs, small ones."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmark.__main__ import main
from benchmark.data import DataSet
from benchmark.experiment import Experiment
from benchmark.machine import peak_memory, reset_peak_memory
from benchmark.measure import measure
from benchmark.predictions import read_predictions
from benchmark.results_file import Results
from benchmark.run import Run
from benchmark.study import Study
from mmap_peft.data.pictograms import draw


SMOKE = Path(__file__).parents[2] / "benchmark" / "studies" / "smoke.yaml"
SHORT = {"max_steps": 1, "per_device_train_batch_size": 8}


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    return main()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Results of the smoke study: `run` starts a process for zero-shot; the others, which have no need of one, are
    measured here."""
    folder = tmp_path_factory.mktemp("smoke")
    results = Results(folder / "smoke")
    for run in Study.read(SMOKE).runs():
        if run.experiment.name != "zero_shot":
            results.append(run, measure(run))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(monkeypatch, "run", SMOKE, "--results", folder, "--workers", 2) == 0
    return results


def test_the_results_of_the_smoke_study(smoke):
    names = {f"pictograms_50-percent/{name}_seed-0": name for name in ("lora_alone", "mmap", "zero_shot")}
    found = {names[name]: result for name, result in smoke.read().items()}
    assert len(found) == 3
    assert len({one["split"] for one in found.values()}) == 1
    for one in found.values():
        accuracies = list(one["accuracy"].values())
        assert list(one["accuracy"]) == ["print", "clipart", "sketch", "photo"]
        assert one["mean"] == pytest.approx(np.mean(accuracies))
        assert one["worst"] == min(accuracies)
        assert one["seconds"]["total"] > one["seconds"]["train"] + one["seconds"]["evaluate"] > 0
        assert 1e8 < one["peak_bytes"]["total"] < 1e10
        assert one["machine"]["threads"] >= 1
        assert one["code"]["versions"]["torch"]
    zero, mmap, lora = found["zero_shot"], found["mmap"], found["lora_alone"]
    assert len(read_predictions(smoke.folder, "pictograms_50-percent/zero_shot_seed-0", zero)) == 240
    assert zero["duplicates"] == {"found": 0, "dropped": 0} and zero["test_images"] == mmap["test_images"]
    assert zero["trainable_parameters"] == zero["adapter_bytes"] == zero["steps"] == 0
    assert zero["seconds"]["step"] is None
    assert mmap["steps"] == 4  # two of each stage
    assert lora["steps"] == 8  # two for each task alone
    # Each adapter of MmAP has the same size: those of the groups, and of four tasks.
    assert mmap["trainable_parameters"] % (len(mmap["groups"]) + 4) == 0
    assert mmap["adapter_bytes"] > 4 * mmap["trainable_parameters"]
    assert lora["trainable_parameters"] == 4 * 28_672
    assert lora["groups"] is None
    assert 0 < mmap["seconds"]["step"] < mmap["seconds"]["train"]
    assert zero["seconds"]["waiting"] == 0 < mmap["seconds"]["waiting"] < mmap["seconds"]["train"]
    assert mmap["peak_bytes"]["step"] <= mmap["peak_bytes"]["total"]


def test_the_commands_on_the_smoke_study(smoke, monkeypatch, capfd):
    folder = smoke.folder.parent
    assert call(monkeypatch, "run", SMOKE, "--results", folder) == 0
    assert "3 of 3 runs have their result; 0 to run." in capfd.readouterr().out
    assert call(monkeypatch, "report", SMOKE, "--results", folder) == 0
    mmap = smoke.read()["pictograms_50-percent/mmap_seed-0"]
    assert f"| mmap | {mmap['trainable_parameters']:,} |" in capfd.readouterr().out
    assert (smoke.folder / "pictograms_50-percent.png").is_file()
    assert call(monkeypatch, "compare", SMOKE, "zero_shot", "mmap", "--results", folder) == 0
    page = capfd.readouterr().out
    assert "Difference: " in page and "`predictions`: mmap (seed 0).\n" in page  # which was measured here
    assert call(monkeypatch, "compare", SMOKE, "zero_shot", "cats", "--results", folder) == 2


def test_mistakes_are_one_sentence_without_a_traceback(study_file, monkeypatch, capfd):
    assert call(monkeypatch, "run", study_file(seeds=3)) == 2
    assert capfd.readouterr().err == "seeds of study 's' is 3; write a list.\n"


@pytest.fixture
def folder(tmp_path):
    """Two domains of three classes of six images each."""
    for domain in ("print", "photo"):
        for name in ("sun", "star", "cat"):
            place = tmp_path / "images" / domain / name
            place.mkdir(parents=True)
            for number in range(6):
                draw(domain, name, number).save(place / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def run(folder, clip_folder):
    experiment = Experiment("probe", "linear_probe", training=SHORT)
    return Run(experiment, DataSet("folder", str(folder)), 0.5, None, 0, clip_folder)


def test_validation_never_reads_a_test_image(run, folder):
    _, split = run.data.read(0.5, None, 0)
    for file in [file for files in split.eval.values() for file in files]:
        (folder / file).write_bytes(b"no image")
    found = measure(replace(run, evaluated_on="validation"))
    assert found["settings"]["evaluated_on"] == "validation"
    assert found["split"] != split.digest
    with pytest.raises(ValueError, match="cannot be read"):
        measure(run)


def test_a_third_of_the_training_images_of_each_class_validates(run, folder):
    domains, split = run.data.read(0.5, None, 0)
    tasks, inner = run.data.hold_out(split, domains, "a {}.", 0)
    for task in tasks:
        assert np.bincount(task.labels("train")).tolist() == [2, 2, 2]
        assert np.bincount(task.labels("eval")).tolist() == [1, 1, 1]
        assert sorted(inner.train[task.name] + inner.eval[task.name]) == sorted(split.train[task.name])
    assert run.data.hold_out(split, domains, "a {}.", 0)[1].digest == inner.digest
    assert run.data.hold_out(split, domains, "a {}.", 1)[1].digest != inner.digest
    domains, split = run.data.read(None, 1, 0)
    with pytest.raises(ValueError, match="one training image of each class"):
        run.data.hold_out(split, domains, "a {}.", 0)


def test_the_same_run_gives_the_same_accuracies_and_alone_is_a_classifier_of_one_task(run):
    whole, again = measure(run), measure(run)
    assert whole["accuracy"] == again["accuracy"]
    alone = measure(replace(run, experiment=replace(run.experiment, tasks="alone")))
    assert alone["trainable_parameters"] == whole["trainable_parameters"]  # a probe is one for each task anyway
    assert alone["steps"] == 2 * whole["steps"] == 2
    assert set(alone["accuracy"]) == {"print", "photo"}


@pytest.mark.parametrize("training", [{}, {"probe_after": 0.5, "max_steps": 2}])
def test_a_task_alone_has_a_probe_on_top_of_its_prompts(run, training):
    config = {"probe": True, "num_prompts": 4, "source_shape": [2, 4]}
    experiment = Experiment("alone", "mmap", config, {**SHORT, **training}, tasks="alone")
    alone = measure(replace(run, experiment=experiment))
    without = measure(replace(run, experiment=replace(experiment, config={**config, "probe": False}, training=SHORT)))
    assert alone["trainable_parameters"] > without["trainable_parameters"]


def test_zero_shot_is_what_a_probe_starts_as(run):
    still = measure(replace(run, experiment=Experiment("z", "linear_probe", training={**SHORT, "learning_rate": 0.0})))
    zero = measure(replace(run, experiment=Experiment("z", "zero_shot")))
    assert zero["accuracy"] == still["accuracy"]
    assert zero["trainable_parameters"] == 0 < still["trainable_parameters"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget a peak")
def test_peaks_are_of_what_came_after_they_were_forgotten():
    held = np.ones(40_000_000)  # 320 MB
    high = peak_memory()
    del held
    reset_peak_memory()
    assert peak_memory() < high - 200_000_000
    held = np.ones(40_000_000)
    assert peak_memory() > high - 50_000_000
    del held

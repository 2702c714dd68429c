"""Predictions of test images: what they hold, where they are kept, and what is made of them."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmark.compare import compare_experiments
from benchmark.data import DataSet
from benchmark.experiment import Experiment
from benchmark.measure import measure
from benchmark.paired import compare
from benchmark.predictions import SCHEMA, correct, keep_predictions, predict, predictions_path, read_predictions
from benchmark.report import write_report
from benchmark.results_file import Results
from benchmark.run import Run
from benchmark.runner import Runner
from benchmark.summary import Row
from mmap_peft import LinearProbeConfig, MultiTaskClassifier
from mmap_peft.multitask.task_trainer import TaskTrainer

from .conftest import full_result


def table(rows, task="print"):
    """Predictions of one task's images: a row has the true and the predicted class."""
    columns = [[task] * len(rows), [f"{task}/{number}" for number in range(len(rows))], *zip(*rows)]
    return pa.table(dict(zip(SCHEMA.names, [*columns, [0.25] * len(rows), [0.5] * len(rows)])), SCHEMA)


def both_tasks(print_rows, photo_rows):
    return pa.concat_tables([table(print_rows), table(photo_rows, "photo")])


@pytest.fixture
def trainer(clip, processor, tasks, arguments):
    return TaskTrainer(MultiTaskClassifier(clip, processor, tasks, LinearProbeConfig()), arguments())


def test_predictions_are_those_of_the_classifier(trainer, tasks):
    metrics, found = predict(trainer)
    assert found.schema == SCHEMA and len(found) == sum(len(task.eval) for task in tasks)
    expected = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval").metrics
    for task in tasks:
        rows = found.filter(pa.compute.equal(found["task"], task.adapter)).to_pandas()
        prediction = trainer.model.predict([row["image"] for row in task.eval], task=task.name)
        assert rows["predicted"].tolist() == prediction.labels
        assert rows["true"].tolist() == [task.class_names[label] for label in task.labels("eval")]
        best, own = prediction.probabilities.max(-1).values, torch.tensor(task.labels("eval"))[:, None]
        assert rows["probability_predicted"].tolist() == pytest.approx(best.tolist(), abs=1e-5)
        of_true = prediction.probabilities.gather(1, own).flatten()
        assert rows["probability_true"].tolist() == pytest.approx(of_true.tolist(), abs=1e-5)
        right = (rows["true"] == rows["predicted"]).to_numpy()
        assert metrics[f"eval_{task.adapter}_accuracy"] == expected[f"eval_{task.adapter}_accuracy"] == right.mean()
        assert correct(found)[task.adapter] == np.packbits(right).tobytes().hex()


def test_a_run_writes_the_predictions_of_its_test_images(tmp_path, clip_folder):
    data = DataSet("pictograms", per_class=3)
    run = Run(Experiment("x", "linear_probe", training={"max_steps": 1}, tasks="alone"), data, None, 1, 0, clip_folder)
    result = measure(run, tmp_path / "result.parquet")
    found, (_, split) = pq.read_table(tmp_path / "result.parquet"), data.read(None, 1, 0)
    assert found["image"].to_pylist() == [file for files in split.eval.values() for file in files]
    assert correct(found) == result["correct"]
    assert result["duplicates"]["dropped"] == 0
    measure(replace(run, evaluated_on="validation", shots=2), tmp_path / "validation.parquet")
    assert not (tmp_path / "validation.parquet").exists()


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/../x", "/etc/x", "a//x", "a/.x", "a/x y", "a\\x", "", "a/-x", "a\0"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="is to name a file"):
        predictions_path(tmp_path, name)
    with pytest.raises(ValueError, match="is to name a file"):
        keep_predictions(tmp_path / "source", tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_runs_are_paths(study):
    for run in study(shots=[2], fractions=[0.125]).runs():
        assert predictions_path("results", run.name).as_posix() == f"results/predictions/{run.name}.parquet"


def test_predictions_are_replaced_in_one_step_and_read_only_with_their_own_result(tmp_path):
    one, other = table([("sun", "sun"), ("sun", "cat")]), table([("sun", "sun"), ("sun", "sun")])
    for number, predictions in enumerate((one, other)):
        pq.write_table(predictions, tmp_path / f"{number}.parquet")
        keep_predictions(tmp_path / f"{number}.parquet", tmp_path, "place/run")
        result = {"correct": correct(predictions)}
        assert read_predictions(tmp_path, "place/run", result).equals(predictions)
        assert [path.name for path in (tmp_path / "predictions" / "place").iterdir()] == ["run.parquet"]
    assert read_predictions(tmp_path, "place/run", {"correct": correct(one)}) is None
    assert read_predictions(tmp_path, "place/run", {}) is None
    assert read_predictions(tmp_path, "place/another", result) is None
    with pytest.raises(FileNotFoundError):
        keep_predictions(tmp_path / "missing", tmp_path, "place/run")
    assert read_predictions(tmp_path, "place/run", result).equals(other)
    path = predictions_path(tmp_path, "place/run")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is no parquet file that can be read"):
        read_predictions(tmp_path, "place/run", result)
    pq.write_table(other.drop_columns(["true"]), path)
    with pytest.raises(ValueError, match="has the columns"):
        read_predictions(tmp_path, "place/run", result)


def test_the_runner_keeps_what_a_run_predicted(study, results, fake, monkeypatch, tmp_path):
    pq.write_table(table([("sun", "sun")]), tmp_path / "made.parquet")
    fake(
        "import shutil\nresult = answer(0.5)\n"
        f"shutil.copy({str(tmp_path / 'made.parquet')!r}, path.replace('.json', '.parquet'))"
    )
    runs = study(seeds=[0]).runs()[:1]
    monkeypatch.setenv("SETTINGS", json.dumps({f"{runs[0].experiment.name}0": runs[0].settings}))
    assert Runner(results)(runs) == 0
    assert pq.read_table(predictions_path(results.folder, runs[0].name)).equals(table([("sun", "sun")]))


def add(results, run, predictions, on_disk=True, **fields):
    """Append the result of a run with these predictions, and keep them."""
    bits, frame = correct(predictions), predictions.to_pandas()
    frame["right"] = frame["true"] == frame["predicted"]
    accuracy = frame.groupby("task", sort=False)["right"].mean().to_dict()
    mean = float(np.mean(list(accuracy.values())))
    results.append(run, {**full_result(run, mean=mean), "accuracy": accuracy, "correct": bits, **fields})
    if on_disk:
        source = results.folder / "made.parquet"
        pq.write_table(predictions, source)
        keep_predictions(source, results.folder, run.name)


WRONG, RIGHT = ("sun", "cat|dog"), ("sun", "sun")


@pytest.fixture
def filled(study, results):
    """`mmap` is right on 80 % of the images, `lora` on 20 %, `zero_shot` on those of `mmap`, less two."""
    made = study(seeds=[0, 1, 2])
    for run in made.runs():
        right = {"mmap": 80, "lora": 20, "zero_shot": 78}[run.experiment.name]
        rows = [RIGHT] * right + [WRONG] * (100 - right)
        add(results, run, both_tasks(rows, rows[::-1]), on_disk=(run.experiment.name, run.seed) != ("lora", 2))
    return made


def test_the_page_that_compares_two_experiments(filled, results):
    text = compare_experiments(filled, results, ["mmap", "lora"], most=3)
    assert "Difference: +60.00 points of mean accuracy, 95 % interval +" in text and "seeds: 3." in text
    assert "Without predictions of this result in `predictions`: lora (seed 2)." in text
    assert "Of 400 predictions of each, 240 are right by mmap only, 0 by lora only. 120 images are" in text
    lines = [line for line in text.splitlines() if line.startswith("| p")]
    assert lines[0] == "| photo | photo/20 | sun | 2 | 2 / 0 | sun / cat\\|dog | 0.25 / 0.25 |"
    assert len(lines) == 3
    back = compare_experiments(filled, results, ["lora", "mmap"], most=0)
    assert "Difference: -60.00 points" in back and "0 are right by lora only, 240 by mmap only" in back


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mmap", "mmap"], "mmap cannot be compared"),
        (["mmap", "cats"], "cats cannot be compared; write two different"),
    ],
)
def test_two_experiments_of_the_study_are_compared(names, message, filled, results):
    with pytest.raises(ValueError, match=message):
        compare_experiments(filled, results, names)


def test_results_without_bits_or_without_runs(study, results):
    made = study()
    with pytest.raises(ValueError, match="holds no result of both mmap and lora; run them first"):
        compare_experiments(made, results, ["mmap", "lora"])
    for run in made.runs():
        results.append(run, full_result(run))
    text = compare_experiments(made, results, ["mmap", "lora"])
    assert "No seed has results of both that say which images were right." in text
    assert "Without predictions of this result in `predictions`: mmap (seed 0), mmap (seed 1), lora (seed 0)" in text


def test_the_report_marks_differences_that_hold(filled, results, no_pictures):
    text = write_report(filled, results)
    assert "| mmap | 5,400 | 0.40 % | 80.0 | 80.0 | 80.0 ± 0.0 |" in text
    table_lines = [line for line in text.splitlines() if "| +60.0* |" in line]
    assert len(table_lines) == 1 and table_lines[0].startswith("| lora | 20.0 | +60.0* |")
    assert "20.0 ± 0.0* |" in text and "80.0 ± 0.0* |" not in text
    rows = {
        name: Row(Experiment(name, "mmap"), {run.seed: results.read()[run.name] for run in runs})
        for name in ("mmap", "zero_shot")
        if (runs := [run for run in filled.runs() if run.experiment.name == name])
    }
    holds = compare(rows["mmap"], rows["zero_shot"]).holds
    assert ("| zero_shot | 78.0 | +2.0* |" if holds else "| zero_shot | 78.0 | +2.0 |") in text
    assert write_report(filled, Results(results.folder)) == text  # the same draws
    named = write_report(replace(filled, reference="lora"), results)
    assert "mean accuracy of lora minus that of the row" in named and "| mmap | 80.0 | -60.0* |" in named


def test_old_results_are_reported_as_before(filled, results, no_pictures):
    for run in filled.runs():
        if run.experiment.name == "lora":
            results.append(run, full_result(run))
    text = write_report(filled, results)
    assert "Not compared, as their results do not say which images were right: lora." in text
    assert "near-duplicates" not in text
    for run in filled.runs():
        results.append(run, full_result(run))
    text = write_report(filled, results)
    assert "Difference:" not in text and "*" not in text.split("## pictograms")[1]


def test_the_report_tells_of_duplicates(study, results, no_pictures):
    made = study(fractions=[0.3, 0.5])
    for run in made.runs():
        results.append(run, full_result(run, duplicates={"found": run.seed, "dropped": 4 * (run.fraction == 0.5)}))
    text = write_report(made, results)
    assert "* Training images that are near-duplicates of test images, pictograms, 30 %: 1\n" in text
    assert "of test images, pictograms, 50 %: 1; 4 more were dropped\n" in text

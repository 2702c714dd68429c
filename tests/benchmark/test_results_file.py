"""One file holds all results of a study: whatever interrupts its writers, no line of it is lost."""

import json
import multiprocessing
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmark.results_file import Results
from benchmark.runner import Runner

from .conftest import full_result


def test_a_line_says_which_run_it_is_of(study, results):
    whole = study({"mmap": {"method": "mmap", "grid": {"training.learning_rate": [0.01, 0.03]}}}, shots=[2])
    runs = whole.runs() + [run for point in whole.validation_runs(whole.experiments[0]) for run in point]
    for run in runs:
        results.append(run, full_result(run))
    lines = [json.loads(line) for line in results.path.read_text().splitlines()]
    keys = [[line[name] for name in ("experiment", "data", "amount", "seed", "evaluated_on")] for line in lines]
    assert keys[0] == ["mmap", "pictograms", "30-percent", 0, "test"]
    assert keys[-1] == ["mmap", "pictograms", "2-shots", 0, "validation"]
    assert len({line["digest"] for line in lines}) == len(lines) == len(runs)
    assert results.read() == {run.name: {**run.key, **full_result(run)} for run in runs}
    assert results.sort(runs) == (results.read(), [], [])


def experiments(results):
    return [json.loads(line)["experiment"] for line in results.path.read_text().splitlines()]


def test_a_last_line_that_is_cut_anywhere_is_ignored_and_the_next_replaces_it(study, results):
    runs = study(seeds=[0]).runs()
    for run in runs:
        results.append(run, full_result(run))
    content = results.path.read_bytes()
    start = content.rstrip().rfind(b"\n") + 1
    whole = len(content) - 1  # without the last line break
    for end in [start, *range(start + 1, whole - 1, 40), whole - 1, whole, whole + 1]:
        results.path.write_bytes(content[:end])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            names = [run.experiment.name for run in results.sort(runs)[2]]
        cut = start < end < whole
        assert names == ([] if end >= whole else ["lora"])
        assert [str(one.message) for one in caught] == cut * [
            f"The last line of {results.path} is incomplete and is ignored."
        ]
        results.append(runs[0], full_result(runs[0]))
        assert experiments(results) == ["zero_shot", "mmap", *(end >= whole) * ["lora"], "zero_shot"]


def test_what_a_killed_writer_did_not_finish_is_run_again(study, results, fake, monkeypatch, capsys):
    fake()
    runs = study(seeds=[0]).runs()
    monkeypatch.setenv("SETTINGS", json.dumps({f"{run.experiment.name}0": run.settings for run in runs}))
    for run in runs:
        results.append(run, full_result(run))
    results.path.write_bytes(results.path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is incomplete and is ignored"):
        assert Runner(results)(runs) == 0
    assert "2 of 3 runs have their result; 1 to run." in capsys.readouterr().out
    assert experiments(results) == ["zero_shot", "mmap", "lora"]


def write(folder, run, count, barrier):
    barrier.wait()
    for number in range(count):
        Results(folder).append(run, {"settings": run.settings, "number": number, "padding": 20_000 * "x"})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="other ways to start a process import everything again")
@pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")
def test_processes_that_write_at_the_same_time_lose_nothing(study, results):
    runs, count = study(seeds=[0]).runs()[:2], 40
    forking = multiprocessing.get_context("fork")
    barrier = forking.Barrier(len(runs))
    writers = [forking.Process(target=write, args=(results.folder, run, count, barrier)) for run in runs]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    lines = [json.loads(line) for line in results.path.read_text().splitlines()]
    for run in runs:
        numbers = [line["number"] for line in lines if line["experiment"] == run.experiment.name]
        assert numbers == list(range(count))


def test_threads_that_write_at_the_same_time_lose_nothing(study, results):
    runs = study(seeds=list(range(8))).runs()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run: results.append(run, full_result(run)), runs))
    assert set(results.read()) == {run.name for run in runs}


@pytest.mark.parametrize("line", ["[]", "{}", "<<<<<<< HEAD", '{"experiment": "mmap"'])
def test_a_line_that_is_no_result_stops_with_a_sentence(line, study, results):
    (run, *_) = study().runs()
    results.folder.mkdir(parents=True)
    results.path.write_text(f"{line}\n")
    results.append(run, full_result(run))
    with pytest.raises(ValueError, match=r"Line 1 of .*results.jsonl holds no result .*remove it"):
        results.sort([run])

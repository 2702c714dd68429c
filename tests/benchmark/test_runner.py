"""What is run, what is kept, and what an interruption leaves. A small script stands for the training."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from benchmark import runner
from benchmark.run import run_name
from benchmark.runner import Runner


@pytest.fixture
def start(monkeypatch, results):
    """Runs a study's runs and returns how many failed."""

    def begin(study, workers=1):
        runs = study.runs()
        settings = {f"{run.experiment.name}{run.seed}": run.settings for run in runs}
        monkeypatch.setenv("SETTINGS", json.dumps(settings))
        return Runner(results, workers)(runs)

    return begin


def logs(results):
    return sorted(path.relative_to(results.folder / "logs").as_posix() for path in results.folder.rglob("*.log"))


def processes(results):
    """Which process made each result."""
    return {name: result["process"] for name, result in results.read().items()}


def remove(results, name):
    lines = results.path.read_text().splitlines(keepends=True)
    results.path.write_text("".join(line for line in lines if run_name(json.loads(line)) != name))


def test_only_what_is_missing_is_run(study, results, fake, start, capsys):
    fake()
    assert start(study()) == 0
    before = processes(results)
    assert len(before) == 6
    assert "[6/6] lora, pictograms, 30 %, seed 1: mean 50.0 %, 1 s; 0 s to go" in capsys.readouterr().out
    gone = "pictograms_30-percent/mmap_seed-1"
    remove(results, gone)
    start(study())
    assert "5 of 6 runs have their result; 1 to run." in capsys.readouterr().out
    after = processes(results)
    assert {name for name in after if after[name] != before[name]} == {gone}


def test_a_result_of_other_settings_is_run_again_and_said(study, results, fake, start, capsys):
    fake()
    start(study(seeds=[0]))
    before = processes(results)
    changed = study(
        {"zero_shot": {"method": "zero_shot"}, "mmap": {"method": "mmap", "config": {"num_prompts": 2}}}, seeds=[0]
    )
    capsys.readouterr()
    start(changed)
    assert (
        "mmap, pictograms, 30 %, seed 0: the result there is of other settings; it is run again."
        in capsys.readouterr().out
    )
    name = "pictograms_30-percent/mmap_seed-0"
    assert {run for run, process in processes(results).items() if process != before[run]} == {name}
    assert results.read()[name]["settings"]["experiment"]["config"] == {"num_prompts": 2}


def test_a_run_that_fails_leaves_the_others_and_no_result(study, results, fake, start, capsys):
    code = """
        result = answer(0.5)
        if name == "mmap":
            open(path, "w").write("{")
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "lora":
            raise ValueError("The learning rate is too high.")
    """
    fake(code)
    assert start(study(seeds=[0])) == 2
    folder = "pictograms_30-percent"
    assert logs(results) == [f"{folder}/{name}" for name in ("lora_seed-0.log", "mmap_seed-0.log")]
    assert list(results.read()) == [f"{folder}/zero_shot_seed-0"]
    told = capsys.readouterr().out
    assert "failed: ValueError: The learning rate is too high." in told
    assert "failed: it ended with -9" in told
    fake()
    assert start(study(seeds=[0])) == 0
    assert logs(results) == []


def test_an_interruption_leaves_whole_results_only_and_no_process(study, results, fake, start, tmp_path):
    code = f"""
        result = answer(0.5)
        if name == "mmap":
            open(path, "w").write("{{")
            open({str(tmp_path / "running")!r}, "w").write(str(os.getpid()))
            time.sleep(60)
    """
    fake(code)

    def interrupt():
        while not (tmp_path / "running").exists() or not (tmp_path / "running").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever runs the tests has made of it
    begin = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            start(study(seeds=[0]))
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - begin < 30
    assert not psutil.pid_exists(int((tmp_path / "running").read_text()))
    assert list(results.read()) == ["pictograms_30-percent/zero_shot_seed-0"]
    assert logs(results) == []


def test_workers_share_the_cores(study, results, fake, start, tmp_path, monkeypatch):
    # Each waits for the other, so one after the other would never end.
    code = f"""
        seen = {str(tmp_path)!r} + "/seen-"
        open(seen + name, "w").close()
        end = time.time() + 30
        while not all(os.path.exists(seen + other) for other in ("mmap", "lora")):
            assert time.time() < end
            time.sleep(0.02)
        result = answer(0.5)
    """
    fake(code)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    experiments = {"mmap": {"method": "mmap"}, "lora": {"method": "lora"}}
    assert start(study(experiments, seeds=[0]), workers=2) == 0
    threads = {result["threads"] for result in results.read().values()}
    assert threads == {"3"}


def test_without_memory_for_two_runs_one_waits(study, results, fake, start, tmp_path, monkeypatch):
    code = f"""
        lock = {str(tmp_path / "lock")!r}
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
        time.sleep(0.2)
        os.unlink(lock)
        result = answer(0.5)
    """
    fake(code)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(runner.psutil, "virtual_memory", lambda: memory._replace(available=runner.FIRST_PEAK - 1))
    assert start(study(seeds=[0]), workers=2) == 0


def test_no_workers_is_one_sentence(results):
    with pytest.raises(ValueError, match="workers=0 runs nothing"):
        Runner(results, 0)


def test_nothing_is_left_in_the_temporary_folder(study, fake, start, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(own))
    fake("import tempfile; tempfile.mkdtemp(); result = answer(0.5)")
    start(study(seeds=[0]))
    assert list(Path(own).iterdir()) == []

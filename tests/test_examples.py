import ast
import functools
import hashlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmap_peft import MultiTaskClassifier, TaskGrouping
from mmap_peft.data import pictograms
from mmap_peft.data.mini_domainnet import CLASS_NAMES, DOMAINS
from mmap_peft.data.pictograms import draw


ROOT = Path(__file__).parents[1]
SHORT = {
    "use_cpu": True,
    "max_steps": 4,
    "grouping_steps": 4,
    "grouping_snapshots": 2,
    "snapshot_images": 8,
    "per_device_train_batch_size": 8,
    "report_to": "none",
}


def launch(*arguments):
    """What `train_officehome.py` prints in a process of its own, which accelerate starts."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "examples" / "train_officehome.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example in this process, and returns what it prints."""

    def run(*arguments, example="train_officehome.py"):
        script = str(ROOT / "examples" / example)
        monkeypatch.syspath_prepend(ROOT / "examples")  # as for a script that is launched
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def options(**fields):
    return [part for name, value in {**SHORT, **fields}.items() for part in (f"--{name}", str(value))]


def check(output, printed, tasks):
    found = json.loads((output / "results.json").read_text())
    assert list(found["accuracy"]) == [*tasks, "mean", "worst"]
    for name, accuracy in found["accuracy"].items():
        assert f"| {name} | {100 * accuracy['zero_shot']:.1f} % | {100 * accuracy['trained']:.1f} % |" in printed
    split = json.loads((output / "split.json").read_text())
    chosen = json.dumps([split["train"], split["eval"]], sort_keys=True)
    assert found["split"] == split["digest"] == hashlib.sha256(chosen.encode()).hexdigest()
    assert {"seed", "seconds", "versions", "groups", "trainable_parameters", "share_of_base"} <= found.keys()
    assert TaskGrouping.load(output / "grouping" / "grouping.json").groups == found["groups"]
    assert (output / "grouping.png").stat().st_size > 10_000
    return found


def test_the_demo_runs_offline(run, pictures, monkeypatch, tmp_path):
    few = functools.partial(pictograms.pictogram_domains, per_class=5)
    monkeypatch.setattr(pictograms, "pictogram_domains", few)
    printed = run("--demo", *options(output_dir=tmp_path / "out", fraction=0.2))
    found = check(tmp_path / "out", printed, ["print", "clipart", "sketch", "photo"])
    assert found["share_of_base"] < 0.01
    classifier = MultiTaskClassifier.from_pretrained(tmp_path / "out")
    assert classifier.predict([draw("photo", "sun", 0)], task="photo").probabilities.shape == (1, 60)
    assert classifier.predict([draw("photo", "sun", 0)]).task_probabilities.shape == (1, 4)


@pytest.fixture
def folder(tmp_path):
    for domain in ("Art", "Real World"):
        for name in ("Alarm_Clock", "Bed", "TV"):
            (tmp_path / "images" / domain / name).mkdir(parents=True)
            for index in range(6):
                Image.new("RGB", (64, 50), (40 * index, 90, 10)).save(
                    tmp_path / "images" / domain / name / f"{index:05}.jpg"
                )
    return tmp_path / "images"


def test_a_folder_and_published_lists_from_a_yaml_file(folder, clip_folder, tmp_path):
    for domain in ("Art", "Real_World"):
        lists = tmp_path / "lists" / domain
        lists.mkdir(parents=True)
        for split, indices in (("train", range(2)), ("test", range(2, 6))):
            lines = [
                f"{domain}/{name}/{index:05}.jpg {label}\n"
                for label, name in enumerate(("Alarm_Clock", "Bed", "TV"))
                for index in indices
            ]
            (lists / f"{split}_10.txt").write_text("".join(lines))
    settings = {
        **SHORT,
        "model": clip_folder,
        "data": str(folder),
        "split_dir": str(tmp_path / "lists"),
        "fraction": 0.1,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    printed = launch(tmp_path / "settings.yaml")
    found = check(tmp_path / "out", printed, ["art", "real_world"])
    assert found["base_model"] == clip_folder
    split = json.loads((tmp_path / "out" / "split.json").read_text())
    assert len(split["train"]["Art"]) == 6


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--fraction", "0.1"], "Give either fraction or shots"),
        (["--split_dir", "lists"], "write --fraction with --split_dir, not --shots"),
    ],
)
def test_two_ways_to_choose_images_stop_with_a_sentence(more, sentence, folder, tmp_path, run):
    with pytest.raises(ValueError, match=sentence):
        run(*options(output_dir=tmp_path / "out", data=folder, shots=2), *more)


@pytest.fixture
def domainnet(tmp_path):
    """A DomainNet of tiny pictures, with a class and a domain that are not MiniDomainNet's, and lists."""
    (tmp_path / "splits_mini").mkdir()
    for domain in [*DOMAINS, "quickdraw"]:
        lines = {"train": [], "test": []}
        for label, name in enumerate([*CLASS_NAMES, "zigzag"]):
            (tmp_path / domain / name).mkdir(parents=True)
            for index in range(3):
                file = f"{domain}/{name}/{index}.jpg"
                Image.new("RGB", (8, 8), (label, 80 * index, 0)).save(tmp_path / file)
                if name in CLASS_NAMES:
                    lines["test" if index == 2 else "train"].append(f"{file} {label}\n")
        for part in lines:
            (tmp_path / "splits_mini" / f"{domain}_{part}.txt").write_text("".join(lines[part]))
    return tmp_path


def test_mini_domainnet_with_its_lists_and_with_a_subset_of_our_own(domainnet, clip_folder, tmp_path, run, pictures):
    arguments = ("--model", clip_folder, "--data", domainnet, "--shots", 1)
    lists = ("--split_dir", domainnet / "splits_mini")
    for name, more, evaluated in (("lists", lists, 1), ("subset", ("--at_most", 3), 2)):
        output = tmp_path / "out" / name
        printed = run(*arguments, *more, *options(output_dir=output), example="train_minidomainnet.py")
        check(output, printed, DOMAINS)
        split = json.loads((output / "split.json").read_text())
        assert [len(split["train"][domain]) for domain in DOMAINS] == 4 * [126]
        assert [len(split["eval"][domain]) for domain in DOMAINS] == 4 * [126 * evaluated]


def test_the_examples_share_no_code_by_copy():
    texts = [(ROOT / "examples" / f"train_{name}.py").read_text() for name in ("officehome", "minidomainnet")]
    trees = [ast.parse(text) for text in texts]
    bodies = [{ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.stmt)} for tree in trees]
    imports = {ast.dump(node) for node in ast.walk(trees[0]) if isinstance(node, ast.Import | ast.ImportFrom)}
    shared = bodies[0] & bodies[1] - imports
    main = {ast.dump(node) for node in trees[0].body if isinstance(node, ast.If)}  # if __name__ == "__main__"
    assert shared - main == {ast.dump(ast.parse("main()").body[0])}
    assert all(len(text.splitlines()) < 60 for text in texts)

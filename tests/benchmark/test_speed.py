"""The variants that are compared do the same; and what is made of their times and memory."""

import functools
import json
import sys
import time

import numpy as np
import pytest
import torch

from benchmark import speed, timing
from benchmark.__main__ import main
from benchmark.internals import plain_path
from benchmark.loading import measure_loading
from benchmark.steps import STEPS, Setting, class_names, random_clip
from benchmark.timing import measure_runs, peak_growth, ratio
from mmap_peft.tuner.texts import can_share


needs_peaks = pytest.mark.skipif(
    peak_growth(lambda: None) is None, reason="the system cannot tell the peak of a part of a process"
)


@pytest.fixture(scope="module")
def clip(processor):
    """Of biases, norms and a temperature that are no zeros and ones."""
    torch.manual_seed(0)
    clip = random_clip("tiny", processor.tokenizer)
    for parameter in clip.parameters():
        if parameter.dim() < 2:
            parameter.add_(0.1 * torch.randn_like(parameter))
        else:
            parameter.mul_(4)
    return clip


@pytest.fixture
def setting(clip, processor):
    setting = Setting(clip, processor, batch=7, tasks=3, classes=5)
    for parameter in setting.parameters:
        parameter.data.mul_(5)
    return setting


def lengths(module):
    """The numbers of tokens that a layer is given from now on."""
    found = set()
    module.register_forward_pre_hook(lambda layer, args: found.add(args[0].shape[1]))
    return found


def compare(setting, steps):
    """The steps' losses and gradients are equal."""
    found = {name: (step(), [parameter.grad for parameter in setting.parameters]) for name, step in steps.items()}
    assert len({id(gradient) for _, parts in found.values() for gradient in parts}) == len(steps) * 3 * 4  # all new
    loss, gradients = found["step"]
    for other, parts in found.values():
        torch.testing.assert_close(other, loss, atol=1e-5, rtol=1e-5)
        for one, part in zip(gradients, parts, strict=True):
            assert one.norm() > 0
            assert (part - one).norm() <= 1e-4 * one.norm()


def test_all_ways_are_the_same_mathematics(setting):
    steps = setting.steps()
    compare(setting, {name: steps[name] for name in ("step", "plain", "practice", "truncated")})


def test_the_compiled_step_is_that_of_the_compiled_classifier(setting, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: lambda **images: compiled.append(model) or model(**images))
    steps = setting.steps(compiled=True)
    assert list(steps) == list(STEPS)
    compare(setting, {name: steps[name] for name in ("step", "compiled")})
    assert compiled == [setting.classifier]


def test_the_image_part_is_the_step_without_the_text_tower(setting):
    steps, loss = setting.steps(), setting.step()
    found = lengths(setting.classifier.clip.text_model.encoder.layers[0].layer_norm2)
    torch.testing.assert_close(steps["images"](), loss, atol=1e-5, rtol=1e-5)
    assert not found
    setting.step()
    assert found


def test_a_snapshot_is_the_gradient_of_the_group_by_task(setting):
    setting.shared()
    group = torch.cat([p.grad.flatten() for p in setting.classifier.adapter_parameters("group_0").values()])
    torch.testing.assert_close(setting.snapshot().sum(dim=0).float() / 7, group, atol=1e-5, rtol=1e-4)


def test_the_practice_fills_the_positions_and_its_truncated_kind_does_not(setting, clip):
    found = lengths(clip.text_model.encoder.layers[1])
    steps = setting.steps()
    steps["practice"]()
    assert found == {77}
    found.clear()
    steps["truncated"]()
    assert found == {8 + 8}  # "a photo of a sun.", and the prompts of group and task


def test_the_plain_path_inserts_tokens_and_ends_with_its_block(setting):
    clip = setting.classifier.clip
    with plain_path(clip):
        assert not can_share(clip, clip.mmap.prompts(["text"]))
        with torch.no_grad():
            before = clip.vision_model.encoder.layers[0].layer_norm2
            found = lengths(before)
            setting.classifier(**setting.images)
            assert found == {1 + 9 + 8}
    assert can_share(clip, clip.mmap.prompts(["text"]))


def test_class_names_are_distinct_and_of_ordinary_length(processor):
    names = class_names(1000)
    assert len(set(names)) == 1000
    ids = processor.tokenizer([f"a photo of a {name}." for name in names])["input_ids"]
    assert {len(one) for one in ids} == {8, 9, 10}
    assert len(set(class_names(10_000))) == 10_000
    with pytest.raises(ValueError, match="classes=0 cannot be named"):
        class_names(0)


def test_a_ratio_is_taken_within_each_repetition():
    # The machine was slow in the last repetition: ratios of medians would be 2.
    assert ratio({"a": [3.0, 2.0, 20.0], "b": [1.0, 1.0, 5.0]}, "a", "b") == 3


def test_all_runs_take_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "peak_growth", lambda run: run())
    runs = {name: functools.partial(calls.append, name) for name in "abc"}
    found = measure_runs(runs, 3)
    assert "".join(calls) == "aabbcc" + "abc" + "cba" + "abc"
    assert {name: len(seconds) for name, seconds in found["seconds"].items()} == {"a": 3, "b": 3, "c": 3}
    with pytest.raises(ValueError, match="repeats=0 measures nothing"):
        measure_runs(runs, 0)


def test_times_are_those_of_the_runs():
    found = measure_runs({"long": lambda: time.sleep(0.05), "short": lambda: None}, 3)
    assert found["median"]["long"] >= 0.05 > found["median"]["short"]


@needs_peaks
def test_a_peak_is_what_a_run_needs_beyond_what_is_held():
    held = np.ones(20_000_000)
    found = peak_growth(lambda: np.ones(40_000_000).sum())
    assert abs(found - 320e6) < 20e6
    many = [np.ones(1_000) for _ in range(40_000)]  # small ones, freed: they are no room that comes for free
    del many
    assert abs(peak_growth(lambda: [np.ones(1_000) for _ in range(40_000)]) - 320e6) < 40e6
    del held


def call(monkeypatch, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", "speed", "--shape", "tiny", "--out", str(out), *arguments])
    return main()


SMALL = ["--batches", "4", "--tasks", "2", "1", "--serving-tasks", "6", "--classes", "5", "--repeats", "1"]


def test_the_command_from_end_to_end(tmp_path, monkeypatch, capsys):
    growth = ["--growth", "--growth-batch", "2", "--growth-tasks", "1", "3", "--growth-classes", "9"]
    assert call(monkeypatch, tmp_path, *SMALL, *growth, "--growth-prompts", "4") == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [(one["batch"], one["tasks"]) for one in found["training"]] == [(4, 2), (4, 1)]
    assert [(one["batch"], one["tasks"]) for one in found["serving"]] == [(4, 6)]
    one = found["training"][0]
    assert list(one["seconds"]) == [name for name in STEPS if name != "compiled"]
    assert one["ratios"]["practice / step"] == ratio(one["seconds"], "practice", "step")
    for memory in (False, True):
        cells = [f"{value:.2f}" for key, value in one["ratios"].items() if key.endswith("memory") == memory]
        assert not cells or f"| 4 | 2 | {' | '.join(cells)} |" in printed
    assert f"{found['serving'][0]['ratios']['classifier / features']:.2f}" in printed
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["settings"] == {"shape": "tiny", "precision": "float32", "repeats": 1, "classes": 5}

    grown = json.loads((tmp_path / "growth.json").read_text())["growth"]
    assert {what: panel["values"] for what, panel in grown.items()} == {
        "tasks": [1, 3],
        "classes": [9],
        "prompts": [4],
    }
    assert set(grown["tasks"]["seconds"]) == {
        *(f"{kind} {count}" for kind in ("step", "shared", "snapshot") for count in (1, 3)),
        *("floor", "floor 3"),  # that of 2 images, and that of an image for each of 3 tasks
    }
    classes, tasks = grown["classes"], grown["tasks"]
    over_floor = ratio(classes["seconds"], "step 9", "floor")
    assert f"| 9 | {over_floor:.2f} | {1000 * classes['median']['step 9']:.0f} |" in printed
    assert f"| 3 | {ratio(tasks['seconds'], 'step 3', 'floor 3'):.2f} |" in printed
    assert printed.strip().endswith((tmp_path / "growth.md").read_text().strip())
    for picture in ("speed.png", "growth.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_growth_alone(tmp_path, monkeypatch):
    growth = ["--growth", "--growth-batch", "1", "--growth-tasks", "1", "--growth-classes", "2", "--repeats", "1"]
    assert call(monkeypatch, tmp_path, "--batches", *growth, "--growth-prompts", "4") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["growth.json", "growth.md", "growth.png"]


def test_an_interruption_keeps_what_is_complete(tmp_path, monkeypatch, capfd):
    whole = measure_runs

    def interrupted(runs, repeats, tick):
        if (tmp_path / "speed.json").exists():
            raise KeyboardInterrupt
        return whole(runs, repeats, tick)

    monkeypatch.setattr(speed, "measure_runs", interrupted)
    assert call(monkeypatch, tmp_path, *SMALL) == 130
    assert capfd.readouterr().err.endswith("Interrupted; all results so far are kept.\n")
    assert len(json.loads((tmp_path / "speed.json").read_text())["training"]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batches", "2", "--tasks", "3"], "3 tasks are more than the 2 images of a batch"),
        (["--batches", "--growth", "--growth-classes", "0"], "classes=0 cannot be named; write a number from 1 to"),
        (["--batches", "1", "--tasks", "1", "--repeats", "0"], "repeats=0 measures nothing; write 1 or more"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, tmp_path, *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_loading_tells_images_a_second_of_each_epoch(tmp_path, monkeypatch, capsys):
    sizes = ["--workers", "0", "1", "--images", "6", "--side", "64", "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark", "loading", "--out", str(tmp_path), *sizes])
    assert main() == 0
    found = json.loads((tmp_path / "loading.json").read_text())
    ways = [(one["workers"], one["cached"]) for one in found["loading"]]
    assert ways == [(0, False), (0, True), (1, False), (1, True)]
    speeds = [f"{6 / seconds:.0f}" for seconds in found["loading"][3]["seconds"]]
    printed = capsys.readouterr().out
    assert f"| 1 | yes | {' | '.join(speeds)} |" in printed
    assert printed == (tmp_path / "loading.md").read_text() + "\n"
    with pytest.raises(ValueError, match="0 images of 400 pixels in 3 epochs of batches of 32 measure nothing"):
        measure_loading(tmp_path, [0], images=0)

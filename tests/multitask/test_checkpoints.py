"""Checkpoints are whole or not there, and training goes on from whole ones only."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer
from mmap_peft.multitask.checkpoint_files import new_checkpoint, problem, remove_leftovers
from mmap_peft.multitask.replacing import sha256


@pytest.fixture
def make(clip, processor, tasks, arguments):
    def make(**fields):
        classifier = MultiTaskClassifier(clip, processor, tasks, MmAPConfig(num_prompts=4, source_shape=(2, 4)))
        return MultiTaskTrainer(classifier, arguments(grouping="all", grouping_steps=0, **fields))

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of the training, once a test has asked for it."""
    return tmp_path_factory.mktemp("finished") / "out"


@pytest.fixture
def trained(make, finished, tmp_path):
    """A trainer after six steps, and its output folder with the checkpoints 2, 4 and 6."""
    trainer, output = make(), tmp_path / "out"
    if finished.exists():
        shutil.copytree(finished, output)
        trainer.model.load_adapters(output / "checkpoint-6")
    else:
        trainer.train()
        shutil.copytree(output, finished)
    return trainer, output


def weights(classifier):
    return {
        name: {k: p.clone() for k, p in classifier.adapter_parameters(name).items()} for name in classifier.adapters
    }


def same(found, expected):
    return all(torch.equal(found[name][key], expected[name][key]) for name in expected for key in expected[name])


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "multitask_state.json", "tasks.json"],
)
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(name, damage, trained, caplog):
    trainer, output = trained
    expected = weights(trainer.model)
    DAMAGES[damage](output / "checkpoint-6" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-6.{name} is (missing|damaged)"):
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-6"))
    assert same(weights(trainer.model), expected)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "Passing over" in caplog.text
    assert same(weights(trainer.model), expected)


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs a file that can be opened but not read")
def test_a_file_that_can_be_opened_but_not_read_is_named(trained):
    path = trained[1] / "checkpoint-6" / "optimizer.pt"
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=r"optimizer\.pt"):
        sha256(path)
    assert re.search(r"checkpoint-6 cannot be read .*optimizer\.pt", problem(path.parent))


def test_a_checkpoint_without_its_optimizer_is_no_place_to_go_on_from(make, tmp_path):
    trainer = make(save_only_model=True)
    trainer.train()
    with pytest.raises(ValueError, match=r"checkpoint-6 has no state of the optimizer.*save_only_model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    with pytest.raises(ValueError, match=r"out holds no whole checkpoint of either stage, as .*checkpoint-2 has no"):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoints_of_before_there_were_digests_are_read_before_they_are_used(trained):
    _, output = trained
    (output / "checkpoint-6" / "checkpoint.json").unlink()
    assert problem(output / "checkpoint-6") is None
    (output / "checkpoint-6" / "optimizer.pt").write_bytes(b"no tensors")
    assert "optimizer.pt is damaged" in problem(output / "checkpoint-6")


@pytest.mark.parametrize("content", ["[]", "{", '{"order": 1}', "[" * 100_000, '{"a": 1, "a": 2}', "\xff"])
def test_a_state_of_another_form_is_named(content, trained):
    trainer, output = trained
    (output / "checkpoint-6" / "checkpoint.json").unlink()
    (output / "checkpoint-6" / "multitask_state.json").write_text(content, encoding="latin-1")
    expected = weights(trainer.model)
    with pytest.raises(ValueError, match=r"multitask_state\.json"):
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-6"))
    assert same(weights(trainer.model), expected)


def test_snapshots_of_an_early_version_are_no_place_to_go_on_from(trained):
    trainer, output = trained
    (output / "checkpoint-6" / "checkpoint.json").unlink()
    state = '{"sampling": "uniform", "order": null, "snapshot_steps": [1], "snapshots": [[[1.0]]]}'
    (output / "checkpoint-6" / "multitask_state.json").write_text(state)
    with pytest.raises(ValueError, match=r"checkpoint of stage 1 of an early version.*start stage 1 again"):
        trainer.train(resume_from_checkpoint=str(output / "checkpoint-6"))


def test_checkpoints_hold_no_card_and_no_picture(trained):
    _, output = trained
    assert {path.suffix for path in (output / "checkpoint-6").rglob("*") if path.is_file()} == {
        ".json", ".safetensors", ".pt", ".pth"
    }  # fmt: skip


def test_what_a_killed_process_left_is_removed_or_finished(trained):
    _, output = trained
    shutil.copytree(output / "checkpoint-6", output / "checkpoint-8.partial" / "checkpoint-8")  # whole, not renamed
    shutil.copytree(output / "checkpoint-6", output / "checkpoint-9.partial" / "checkpoint-9")
    (output / "checkpoint-9.partial" / "checkpoint-9" / "checkpoint.json").unlink()
    with new_checkpoint(output / "checkpoint-10") as new:  # a process that still writes
        new.mkdir()
        remove_leftovers(output)
        assert {path.name for path in output.glob("checkpoint-*")} == {
            "checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8", "checkpoint-10.partial"
        }  # fmt: skip


def test_an_older_checkpoint_of_the_same_step_stays_until_the_new_one_is_whole(trained):
    _, output = trained
    with pytest.raises(RuntimeError), new_checkpoint(output / "checkpoint-6") as new:
        new.mkdir()
        raise RuntimeError
    assert problem(output / "checkpoint-6") is None
    with new_checkpoint(output / "checkpoint-6") as new:
        new.mkdir()
        (new / "file").write_text("")
    assert {path.name for path in (output / "checkpoint-6").iterdir()} == {"file", "checkpoint.json"}
    assert not list(output.glob("*.partial"))


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_at_the_last_step_is_not_saved(limit, make, tmp_path, monkeypatch):
    trainer = make(max_grad_norm=limit, logging_steps=100)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        if trainer.state.global_step == 5:
            trainer.model.adapter_parameters("print")["source"].grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(trainer, "training_step", training_step)
    with pytest.raises(ValueError, match="The gradient is not finite at step 5, though the loss is"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_disk_that_is_full_is_named_and_earlier_checkpoints_stay(make, tmp_path, monkeypatch):
    trainer = make()
    save = torch.save

    def full(*args, **kwargs):
        if trainer.state.global_step == 4:
            raise RuntimeError("[enforce fail at inline_container.cc:672] PytorchStreamWriter failed writing file")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-4 cannot be written .*earlier checkpoints are whole"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "checkpoint.json").read_text())

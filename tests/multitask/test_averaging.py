"""The average of the adapters over the epochs: its formula, and that it is what is evaluated, saved and resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mmap_peft import (
    IVLPConfig,
    MmAPConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    PromptSRCConfig,
    lora_config,
)
from mmap_peft.multitask.averaging import LAST_FILE, epoch_weights

from ..conftest import load_clip


LOSSES = {"text_consistency": 25, "image_consistency": 10, "logit_consistency": 1}
AVERAGE = {"average_mean": 0.5, "average_std": 0.4}
ONE_STAGE = {"grouping": "all", "grouping_steps": 0, "learning_rate": 0.1}
CONFIGS = {
    "mmap": MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1),
    "ivlp": IVLPConfig(num_prompts=2, depth=2, init_std=0.1),
    "promptsrc": PromptSRCConfig(num_prompts=2, depth=2, init_std=0.1),
    "lora": lora_config(r=2),
}


@pytest.fixture
def make(clip_folder, processor, tasks, arguments):
    """Makes a trainer of a fresh classifier. An epoch has four steps."""

    def trainer(config="mmap", callbacks=(), **fields):
        clip = load_clip(clip_folder)
        classifier = MultiTaskClassifier(clip, processor, tasks, CONFIGS[config])
        return MultiTaskTrainer(classifier, arguments(**fields), callbacks=list(callbacks))

    return trainer


def values(classifier):
    return {
        f"{adapter}.{name}": parameter.detach().clone()
        for adapter in classifier.adapters
        for name, parameter in classifier.adapter_parameters(adapter).items()
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Record(TrainerCallback):
    """The adapters after each step, and when they are evaluated."""

    def __init__(self, stop_at=None):
        self.after, self.evaluated, self.stop_at = {}, {}, stop_at

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = values(model)
        if state.global_step == self.stop_at and state.max_steps > 4:
            raise KeyboardInterrupt

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.evaluated[state.global_step] = values(model)


def weighted(record, ends, mean, std, epochs):
    """The sum of the adapters after some steps, the ends of epochs, with Gaussian weights that sum to 1."""
    raw = [math.exp(-((epoch - mean * epochs) ** 2) / (2 * (std * epochs) ** 2)) for epoch in range(1, len(ends) + 1)]
    return {
        name: sum(weight / sum(raw) * record.after[step][name].double() for weight, step in zip(raw, ends)).float()
        for name in record.after[ends[0]]
    }


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(15, 1), (30, 30), (45, 5), (1, 100), (1000, 0.01)])
def test_weights_are_a_gaussian_and_sum_to_one(mean, std):
    weights = epoch_weights(50, mean, std)
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0
    assert weights.index(max(weights)) + 1 == min(mean, 50)
    for one, other in ((44, 45), (14, 13), (29, 30)):
        if weights[one] and weights[other]:
            expected = (((other + 1 - mean) / std) ** 2 - ((one + 1 - mean) / std) ** 2) / 2
            assert math.log(weights[one] / weights[other]) == pytest.approx(expected, abs=1e-9)


def test_the_defaults_of_promptsrc_are_epoch_15_of_20():
    args = {"mean": 0.75 * 20, "std": 0.05 * 20}
    assert args == {"mean": 15, "std": 1}
    weights = epoch_weights(20, **args)
    assert weights[14] == pytest.approx(1 / math.sqrt(2 * math.pi), abs=1e-3)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("steps", [12, 10])  # the last epoch may be cut short
def test_training_results_in_the_weighted_sum_of_the_epochs(config, steps, make):
    record = Record()
    stage = {"learning_rate": 0.1} if config == "lora" else ONE_STAGE
    trainer = make(config, [record], max_steps=steps, **stage, **AVERAGE)
    trainer.train()
    found = values(trainer.model)
    assert trainer.sampler.steps == 4
    assert_close(found, weighted(record, [4, 8, steps], 0.5, 0.4, 3))
    assert any((found[name] - record.after[steps][name]).abs().max() > 1e-3 for name in found)


def test_what_is_evaluated_and_saved_is_the_average_so_far(make):
    record = Record()
    trainer = make(callbacks=[record], max_steps=12, eval_strategy="steps", eval_steps=2, **ONE_STAGE, **AVERAGE)
    trainer.train()
    output, ends = Path(trainer.args.output_dir), {2: [], 4: [4], 6: [4], 8: [4, 8], 10: [4, 8], 12: [4, 8, 12]}
    for step, epochs in ends.items():
        folder = output / f"checkpoint-{step}"
        expected = weighted(record, epochs, 0.5, 0.4, 3) if epochs else record.after[step]
        assert_close(record.evaluated[step], expected)
        saved = MultiTaskClassifier.from_pretrained(folder, processor=trainer.model.processor)
        assert_equal(values(saved), record.evaluated[step])
        assert (folder / LAST_FILE).exists() == bool(epochs)
        if epochs:
            assert_equal(load_file(folder / LAST_FILE), record.after[step])
    assert_equal(values(trainer.model), record.evaluated[12])


@pytest.mark.parametrize(("config", "step"), [("mmap", 3), ("mmap", 4), ("promptsrc", 6), ("promptsrc", 11)])
def test_resuming_equals_the_uninterrupted_run(config, step, make, tmp_path):
    fields = {"max_steps": 12, "save_steps": 1, "grouping_steps": 3, "learning_rate": 0.1, **LOSSES, **AVERAGE}
    whole = make(config, output_dir=str(tmp_path / "whole"), **fields)
    whole.train()
    cut = make(config, [Record(stop_at=step + 1)], output_dir=str(tmp_path / "cut"), **fields)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = make(config, output_dir=str(tmp_path / "cut"), **fields)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(values(resumed.model), values(whole.model))
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (whole, resumed)]
    assert losses[0] == losses[1]


def test_going_on_without_an_average_goes_on_with_the_last_adapters(make):
    settings = {**ONE_STAGE, "lr_scheduler_type": "constant"}
    make(max_steps=8, **settings, **AVERAGE).train()
    resumed, whole = make(max_steps=9, **settings), make(max_steps=9, **settings)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert_equal(values(resumed.model), values(whole.model))


def test_the_best_model_is_the_average_that_was_evaluated_best(make):
    record = Record()
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the worst: usually not the last
    trainer = make(callbacks=[record], max_steps=12, **settings, **ONE_STAGE, **AVERAGE)
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < 12
    assert_equal(values(trainer.model), record.evaluated[best])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric)


def test_a_training_that_is_interrupted_leaves_the_last_adapters(make):
    record = Record(stop_at=6)
    trainer = make(callbacks=[record], max_steps=12, **ONE_STAGE, **AVERAGE)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.evaluate()
    assert_equal(values(trainer.model), record.after[6])


def test_without_these_settings_training_is_what_it_was(make, tmp_path):
    """To the bit, as the losses of weight 0 are; PromptSRC without its losses and average is IVLP."""
    fields = {"max_steps": 6, "learning_rate": 0.1, "grouping_steps": 3}
    off = {**dict.fromkeys(LOSSES, 0.0), "average_mean": 0.0}
    mmap, zero = make("mmap", output_dir=str(tmp_path / "mmap"), **fields), make("mmap", **fields, **off)
    mmap.train()
    zero.train()
    assert_equal(values(mmap.model), values(zero.model))
    assert not list((tmp_path / "mmap").rglob(LAST_FILE))
    ivlp, full = make("ivlp", **fields), make("promptsrc", **fields)
    promptsrc = make("promptsrc", **fields, **off)
    for trainer in (ivlp, promptsrc, full):
        trainer.train()
    assert_equal(values(ivlp.model), values(promptsrc.model))
    assert any(not torch.equal(one, values(full.model)[name]) for name, one in values(ivlp.model).items())


def test_a_damaged_file_of_the_last_adapters_stops_with_a_sentence(make):
    trainer = make(max_steps=8, **ONE_STAGE, **AVERAGE)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-8"
    (folder / LAST_FILE).write_bytes(b"0" * 100)
    with pytest.raises(ValueError, match=rf"{LAST_FILE} is damaged"):
        make(max_steps=9, **ONE_STAGE, **AVERAGE).train(resume_from_checkpoint=str(folder))


def test_accumulated_batches_and_an_aggregator_that_sums_equal_a_large_batch(make):
    fields = {"max_steps": 3, "optim": "sgd", "learning_rate": 1.0, "grouping": "all", "grouping_steps": 0, **LOSSES}
    whole = make(per_device_train_batch_size=12, **fields)
    parts = make(per_device_train_batch_size=6, gradient_accumulation_steps=2, **fields)
    summed = make(per_device_train_batch_size=6, gradient_accumulation_steps=2, aggregator="Sum", **fields)
    plain = make(per_device_train_batch_size=12, **{**fields, **dict.fromkeys(LOSSES, 0)})
    for trainer in (whole, parts, summed, plain):
        trainer.train()
    for name, value in values(whole.model).items():
        torch.testing.assert_close(values(parts.model)[name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values(summed.model)[name], value, atol=1e-5, rtol=1e-4)
    assert any((values(plain.model)[name] - value).abs().max() > 1e-3 for name, value in values(whole.model).items())


def test_evaluation_has_the_cross_entropy_only(make):
    plain, trainer = make(**ONE_STAGE), make(**ONE_STAGE, **LOSSES)
    trainer._consistency = trainer._make_consistency(list(trainer.model.tasks))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]

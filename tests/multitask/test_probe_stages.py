"""`probe_after`: prompts first, then the probes on top of them."""

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel, TrainerCallback

from mmap_peft import LinearProbeConfig, MmAPConfig, MultiTaskClassifier, MultiTaskTrainer


STEPS, SWITCH = 6, 3
FIELDS = {
    "max_steps": STEPS,
    "grouping_steps": 0,
    "grouping": "all",
    "save_steps": 1,
    "sharing": "none",
    "max_grad_norm": 0.0,
}


@pytest.fixture
def make(clip_folder, processor, tasks):
    def classifier(probe=True):
        config = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.2, probe=probe, probe_scale=0.3)
        return MultiTaskClassifier(CLIPModel.from_pretrained(clip_folder), processor, tasks, config)

    return classifier


class Recorder(TrainerCallback):
    """The adapters after each step; training can be interrupted after one of them."""

    def __init__(self, stop=None):
        self.states, self.stop = [], stop

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append(
            {(a, name): p.detach().clone() for a in model.adapters for name, p in model.adapter_parameters(a).items()}
        )
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def train(classifier, args, stop=None, **kwargs):
    recorder = Recorder(stop)
    trainer = MultiTaskTrainer(model=classifier, args=args, callbacks=[recorder])
    trainer.train(**kwargs)
    return trainer, recorder.states


@pytest.mark.parametrize(
    "fields",
    [
        {"sharing": "none"},
        {"sharing": "groups", "grouping": "given", "given_groups": "print+photo,clipart"},
        {"sharing": "groups", "aggregator": "PCGrad"},
        {"sharing": "none", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "max_grad_norm": 0.1},
    ],
    ids=["none", "groups", "aggregator", "accumulation"],
)
def test_prompts_train_as_without_a_probe_and_then_stay(fields, make, arguments, tmp_path):
    fields = {**FIELDS, "save_strategy": "no", **fields}
    classifier = make()
    trainer, states = train(classifier, arguments(probe_after=SWITCH / STEPS, **fields))
    _, plain = train(make(probe=False), arguments(**fields))
    for step, state in enumerate(states, 1):
        for (adapter, name), value in state.items():
            if name.startswith("probe."):
                assert value.any() == (step > SWITCH)
            else:
                assert torch.equal(value, plain[min(step, SWITCH) - 1][adapter, name])
    assert any(not torch.equal(value, plain[SWITCH - 1][key]) for key, value in plain[-1].items())
    assert all(p.requires_grad and p.grad is None for _, p in parameters(classifier))
    assert set(trainer.model.training_adapters) == set(classifier.adapters)


def parameters(classifier):
    return [(name, p) for a in classifier.adapters for name, p in classifier.adapter_parameters(a).items()]


def test_the_second_stage_is_a_linear_classifier_that_starts_as_the_texts(make, arguments):
    """AdamW on features of the trained prompts, from weights T and 0, by cross entropy."""
    classifier, batches, rates = make(), [], []

    class Spy(MultiTaskTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.state.global_step >= SWITCH:
                batches.append(inputs)
                rates.append(self.lr_scheduler.get_last_lr()[0])
            return super().compute_loss(model, inputs, *args, **kwargs)

    Spy(model=classifier, args=arguments(probe_after=0.5, **FIELDS | {"save_strategy": "no"})).train()
    names = list(classifier.tasks)
    with torch.no_grad():
        texts = classifier.encode_texts(names)
        delta, bias = ([torch.zeros(shape) for shape in shapes] for shapes in
                       ([t.shape for t in texts], [t.shape[:1] for t in texts]))  # fmt: skip
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in (*delta, *bias)], weight_decay=0.0)
    assert len(batches) == STEPS - SWITCH
    for batch, rate in zip(batches, rates):
        loss = 0.0
        for image, number, label in zip(batch["pixel_values"], batch["task_ids"].tolist(), batch["labels"]):
            with torch.no_grad():
                x = classifier.image_features(image[None], [classifier.routes[names[number]]], torch.zeros(1).long())
            weight, offset = texts[number] + 0.3 * delta[number], 0.3 * bias[number]
            logits = classifier.logit_scale().detach() * x @ weight.T + offset
            loss = loss + F.cross_entropy(logits, label[None]) / len(batch["labels"])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, expected, offset in zip(names, delta, bias):
        found = classifier.adapter_parameters(name)
        torch.testing.assert_close(found["probe.delta"], expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(found["probe.bias"], offset, atol=1e-4, rtol=1e-3)
        assert found["probe.delta"].abs().max() > 1e-3


def test_resuming_in_either_stage_equals_the_uninterrupted_run(make, arguments, tmp_path):
    fields = {**FIELDS, "probe_after": 0.5}
    _, whole = train(make(), arguments(output_dir=str(tmp_path / "whole"), **fields))
    for stop in (SWITCH, SWITCH + 1, SWITCH + 2):  # killed after the checkpoint of one step less
        args = arguments(output_dir=str(tmp_path / str(stop)), **fields)
        with pytest.raises(KeyboardInterrupt):
            train(make(), args, stop=stop)
        _, resumed = train(make(), args, resume_from_checkpoint=True)
        assert len(resumed) == STEPS - stop + 1
        for key, value in whole[-1].items():
            assert torch.equal(resumed[-1][key], value), (stop, key)


def test_refusals(make, arguments, clip, processor, tasks):
    for value in (0.0, 1.0, True, "0.5"):
        with pytest.raises(ValueError, match="for `probe_after`: expected a finite number"):
            arguments(probe_after=value)
    for model in make(probe=False), MultiTaskClassifier(clip, processor, tasks, LinearProbeConfig()):
        name = type(model.adapter_config).__name__
        with pytest.raises(ValueError, match=f"probes after prompts, but {name} has no probes"):
            MultiTaskTrainer(model=model, args=arguments(probe_after=0.5))
    with pytest.raises(ValueError, match=r"training results in other prompts; write average_mean=0\.0, or"):
        MultiTaskTrainer(model=make(), args=arguments(probe_after=0.5, average_mean=0.75))

"""No training or evaluation step waits for a GPU, whatever the method."""

import pytest
import torch
from transformers import TrainerCallback

from mmap_peft import (
    BitFitConfig,
    CLIPAdapterConfig,
    CoOpConfig,
    IVLPConfig,
    LinearProbeConfig,
    MaPLeConfig,
    MmAPConfig,
    MMRLTokensConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    PromptSRCConfig,
    VPTConfig,
    lora_config,
)

from .waits import Wait, watched


MMAP = {"num_prompts": 4, "source_shape": (2, 4)}
GROUPS = {"grouping": "given", "given_groups": "print+clipart,photo", "grouping_steps": 0}
ALONE = {"sharing": "none"}
CASES = {
    "MmAP, groups": (MmAPConfig(**MMAP), GROUPS),
    "MmAP, checkpointed": (MmAPConfig(**MMAP), GROUPS),
    "CoOp": (CoOpConfig(num_prompts=2), ALONE),
    "CoOp, middle": (CoOpConfig(num_prompts=2, position="middle"), ALONE),
    "VPT": (VPTConfig(num_prompts=2), ALONE),
    "IVLP, checkpointed": (IVLPConfig(num_prompts=2), {"sharing": "all"}),
    "MaPLe": (MaPLeConfig(num_prompts=2), {"sharing": "all"}),
    "PromptSRC": (PromptSRCConfig(num_prompts=2, depth=3), {"sharing": "all"}),
    "MMRL": (MMRLTokensConfig(first_layer=1), ALONE),
    "LoRA": (lora_config(r=2), {}),
    "BitFit": (BitFitConfig(), {}),
    "linear probe": (LinearProbeConfig(), {}),
    "CLIP-Adapter": (CLIPAdapterConfig(), {}),
    "aggregator": (MmAPConfig(**MMAP), {**GROUPS, "aggregator": "Mean"}),
    "augmented": (MmAPConfig(**MMAP), {**GROUPS, "augment": "crop+flip+jitter", "max_grad_norm": 0.0}),
}


class Steps(TrainerCallback):
    """Turns a `Watch` on for the third training step, and for a batch of an evaluation whose task was seen before."""

    def __init__(self, watch):
        self.watch, self.batches = watch, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.watch.on = state.global_step == 2

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += 1
        self.watch.on = self.batches == 3


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits(case, clip, processor, tasks, arguments, monkeypatch):
    config, fields = CASES[case]
    classifier = MultiTaskClassifier(clip, processor, tasks, config)
    steps = {"max_steps": 3, "logging_steps": 9, "save_strategy": "no", "per_device_eval_batch_size": 4}
    fields = {**steps, "cache_features": "never", **fields}  # what is kept of an image is waited for once
    if "checkpointed" in case:
        classifier.activation_checkpointing_enable()
    trainer = MultiTaskTrainer(model=classifier, args=arguments(**fields))
    with watched(monkeypatch) as watch:
        watch_batches(trainer, watch)
        trainer.add_callback(Steps(watch))
        trainer.train()
        seen = watch.seen
        assert seen > 100
        trainer.evaluate()
        assert watch.seen > seen + 50


class Reading(torch.autograd.Function):
    @staticmethod
    def forward(context, tensor):
        return tensor.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * gradient.sum().item()


WAITS = {
    "item": lambda gpu, cpu: gpu.sum().item(),
    "if": lambda gpu, cpu: 1 if gpu.any() else 0,
    "tolist": lambda gpu, cpu: gpu.tolist(),
    "cpu": lambda gpu, cpu: gpu.cpu(),
    "finite": lambda gpu, cpu: bool(gpu.isfinite().all()),
    "nonzero": lambda gpu, cpu: gpu.nonzero(),
    "mask": lambda gpu, cpu: gpu[gpu > 0],
    "equal": lambda gpu, cpu: torch.equal(gpu, gpu),
    "unique": lambda gpu, cpu: gpu.unique(),
    "repeat": lambda gpu, cpu: gpu.repeat_interleave(gpu.long()),
    "list as index": lambda gpu, cpu: gpu[[0, 1]],
    "tensor of a list": lambda gpu, cpu: gpu + torch.tensor([1, 2, 3], device=gpu.device),
    "made on the CPU": lambda gpu, cpu: gpu + torch.ones(3),
    "transfer": lambda gpu, cpu: gpu + cpu.to(gpu.device),
    "in the backward pass": lambda gpu, cpu: Reading.apply(gpu.requires_grad_()).sum().backward(),
}
FREE = {
    "numbers": lambda gpu, cpu: (2 * gpu + 1).clamp(min=0).sum() / 3,
    "made on the GPU": lambda gpu, cpu: gpu[torch.arange(2, device=gpu.device)] + torch.zeros(2, device=gpu.device),
    "filled": lambda gpu, cpu: gpu.masked_fill(gpu > 0, 1).where(gpu > 0, 0),
    "of the CPU alone": lambda gpu, cpu: cpu.tolist() + [cpu.sum().item(), bool(torch.ones(1))],
}


@pytest.mark.parametrize("case", [*WAITS, *FREE])
def test_what_a_watch_finds(case, monkeypatch):
    cpu = torch.tensor([1.0, 2.0, 3.0])
    gpu = cpu.clone()
    with watched(monkeypatch) as watch:
        watch.put(gpu)
        watch.on = True
        if case in FREE:
            FREE[case](gpu, cpu)
            return
        with pytest.raises(Wait):
            WAITS[case](gpu, cpu)


def watch_batches(trainer, watch):
    """The model is on the GPU, and so is every batch that a step gets."""
    model_inputs = trainer.model_inputs

    def on_gpu(batch):
        watch.put(*trainer.model.parameters(), *trainer.model.buffers(), *batch.values())
        return model_inputs(batch)

    on_gpu({})
    trainer.model_inputs = on_gpu

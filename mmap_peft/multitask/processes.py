"""Training small adapters in a large frozen model on several processes."""

from __future__ import annotations

import os

import numpy as np
import torch
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import Trainer


def set_up(trainer: Trainer) -> None:
    """Prepare a trainer's model for the way in which its processes were launched.

    FSDP shards only the frozen base. Adapters are small and are replaced between the stages, so every process keeps
    all of them, and checkpoints are those of an unsharded run.

    Raises:
        ValueError: processes that are not connected, FSDP in version 1 or together with `text_chunk`, stage 3 of ZeRO,
            or DeepSpeed together with an aggregator.
    """
    state, model, args = trainer.accelerator.state, trainer.model, trainer.args
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"{launched} processes were launched, but each would train alone, as there is no GPU for it; write "
            "use_cpu=True (--use_cpu) to let them train together on the CPU."
        )
    if trainer.is_fsdp_enabled:
        _shard(trainer)
    elif trainer.is_deepspeed_enabled:
        if state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed was asked for with zero_stage 3, which would take the prompts apart between the stages; "
                "write zero_stage: 2, or shard the frozen base with FSDP (fsdp_version: 2)."
            )
        if args.aggregator is not None:
            raise ValueError(
                f"aggregator={args.aggregator!r} replaces the backward pass, which DeepSpeed's engine needs; use DDP "
                "(examples/accelerate_configs/multi_gpu.yaml)."
            )
        for parameter in model.parameters():
            if not parameter.dim():
                parameter.ds_optim_param = True  # "do not broadcast": DeepSpeed 0.19 cannot broadcast a scalar


def _shard(trainer: Trainer) -> None:
    """Let FSDP shard the frozen base of a trainer's model."""
    model, plugin = trainer.model, trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP was asked for in version 1, which cannot leave the prompts whole; write fsdp_version: 2, or use "
            "DDP, which is enough for prompts this small."
        )
    if model.text_chunk is not None:
        raise ValueError(
            f"text_chunk={model.text_chunk} was given together with FSDP, where processes with different numbers "
            "of texts would wait for each other for ever; leave text_chunk out."
        )
    whole = [parameter for parameter in model.parameters() if parameter.requires_grad or not parameter.dim()]
    plugin.ignored_modules = [nn.ParameterList(whole).to(trainer.args.device)]
    first = not is_sharded(model)  # stage 2 has the model of stage 1
    fsdp2_prepare_model(trainer.accelerator, model)
    if first:
        for name in ("plain_features", "frozen_text_features"):  # they gather the weights, too
            register_fsdp_forward_method(model, name)
    trainer.is_fsdp_enabled = False  # nothing that is trained or saved is sharded


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs all processes at once."""
    return isinstance(model, FSDPModule)


def average_gradients(trainer: Trainer) -> None:
    """Average the adapters' gradients over processes: FSDP does not do it for parameters that it does not shard."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = trainer.accelerator.reduce(gradient, reduction="mean")


def shard_rows(rows: np.ndarray, size: int, rank: int, world: int) -> list[np.ndarray]:
    """Rows of process `rank` of `world`, in batches of at most `size`. All processes have the same number of batches.

    A process without rows has one empty batch.
    """
    most = -(-len(rows) // world)
    return np.array_split(rows[rank::world], -(-most // size))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

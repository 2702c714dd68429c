"""Trains a tiny classifier on as many processes as there are: `train_tiny.py CLIP OUTPUT ACCUMULATION`.

Then goes on once more from the checkpoint in the middle of stage 2, into `OUTPUT/resumed`, trains one adapter of all
tasks with an aggregator, into `OUTPUT/aggregated`, and with the losses and the average of PromptSRC, into
`OUTPUT/regularized`, and on augmented images, into `OUTPUT/augmented`.
"""

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import CLIPModel

from mmap_peft import (
    MmAPConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    TipAdapterConfig,
    load_processor,
)
from tests.conftest import make_task


def count_as_gpus() -> None:
    """accelerate offers FSDP to processes with GPUs only, though torch shards on a CPU as well."""
    original = PartialState.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def mmap(**fields) -> MmAPConfig:
    return MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1, **fields)


def make_trainer(clip: str, output: str, accumulation: int, config=None, **fields) -> MultiTaskTrainer:
    tasks = [make_task("print", 3), make_task("clipart", 5), make_task("photo", 4)]
    config = config or mmap()
    classifier = MultiTaskClassifier(CLIPModel.from_pretrained(clip), load_processor(clip), tasks, config)
    args = MultiTaskTrainingArguments(
        output_dir=output,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=12 // int(os.environ.get("WORLD_SIZE", "1")) // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=5,
        grouping_steps=4,
        grouping_snapshots=2,
        snapshot_images=5,
        save_steps=3,
        **fields,
    )
    return MultiTaskTrainer(model=classifier, args=args)


def remember_images(trainer: MultiTaskTrainer) -> list[str]:
    """The SHA-256 of each image that training steps will see in this process."""
    model_inputs, seen = trainer.model_inputs, []

    def remember(batch):
        batch = model_inputs(batch)
        seen.extend(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch["pixel_values"])
        return batch

    trainer.model_inputs = remember
    return seen


def main(clip: str, output: Path, accumulation: int) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        count_as_gpus()
    tempfile.tempdir = str(output / "tmp")  # where features are kept, by all processes of this launch
    os.makedirs(tempfile.tempdir, exist_ok=True)
    trainer = make_trainer(clip, str(output), accumulation)
    with trainer.model.zero_shot():
        trainer.evaluate()
    trainer.train()
    trainer.model.compute_prototypes(batch_size=5)
    metrics = trainer.evaluate()
    resumed = make_trainer(clip, str(output / "resumed"), accumulation)
    resumed.train(resume_from_checkpoint=str(output / "checkpoint-3"))
    losses = {"text_consistency": 25, "image_consistency": 10, "logit_consistency": 1, "average_mean": 0.75}
    regularized = make_trainer(clip, str(output / "regularized"), accumulation, sharing="all", **losses)
    regularized.train()
    if trainer.is_world_process_zero():
        regularized.model.save_pretrained(output / "regularized")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        for name, fields in {
            "aggregated": {"aggregator": "PCGrad", "sharing": "all"},
            "two stages": {"config": mmap(probe=True), "probe_after": 0.6, "sharing": "none"},
            "computed": {"config": mmap(first_layer=1), "sharing": "all", "cache_features": "never"},
            "kept": {"config": mmap(first_layer=1), "sharing": "all"},
            "caches": {"config": TipAdapterConfig(train_keys=True), "learning_rate": 1e-2},
        }.items():
            another = make_trainer(clip, str(output / name), accumulation, **fields)
            another.train()
            if trainer.is_world_process_zero():
                another.model.save_pretrained(output / name)
    augmented = make_trainer(clip, str(output / "augmented"), accumulation, augment="crop+flip+jitter", sharing="all")
    images = remember_images(augmented)
    augmented.train()
    (output / f"images_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(images))
    if trainer.is_world_process_zero():
        augmented.model.save_pretrained(output / "augmented")
        trainer.model.save_pretrained(output)
        resumed.model.save_pretrained(output / "resumed")
        trainer.save_metrics("eval", metrics)
        weight = trainer.model.clip.vision_model.encoder.layers[0].mlp.fc1.weight
        found = {
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "kind": trainer.accelerator.distributed_type.value,
            "sharded": isinstance(weight, DTensor) and weight.to_local().numel() < weight.numel(),
        }
        (output / "launch.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))

"""Trains a tiny classifier on as many processes as there are, without and with features that are kept:
`train_cached.py CLIP OUTPUT`."""

import sys
from pathlib import Path

import torch
from transformers import CLIPModel

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, MultiTaskTrainingArguments, load_processor
from tests.conftest import make_task


if __name__ == "__main__":
    clip, output = sys.argv[1], Path(sys.argv[2])
    for name, choice in (("never", "never"), ("auto", "auto"), ("again", "auto")):
        tasks = [make_task("print", 3), make_task("photo", 4)]
        config = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1, first_layer=1)
        classifier = MultiTaskClassifier(CLIPModel.from_pretrained(clip), load_processor(clip), tasks, config)
        args = MultiTaskTrainingArguments(
            output_dir=str(output / name),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_train_batch_size=2,
            max_steps=6,
            sharing="all",
            save_strategy="no",
            cache_features=choice,
        )
        trainer = MultiTaskTrainer(model=classifier, args=args)
        trainer.train()
        if trainer.is_world_process_zero():
            weights = [parameter.detach() for parameter in classifier.parameters() if parameter.requires_grad]
            torch.save(weights, output / f"{name}.pt")

"""Trains a tiny classifier on as many processes as there are: `train_tiny.py CLIP OUTPUT IMAGES_A_STEP`."""

import os
import sys

from transformers import CLIPModel

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, MultiTaskTrainingArguments, load_processor
from tests.conftest import make_task


if __name__ == "__main__":
    clip, output, images = sys.argv[1:]
    tasks = [make_task("print", 3), make_task("clipart", 5), make_task("photo", 4)]
    config = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.1)
    classifier = MultiTaskClassifier(CLIPModel.from_pretrained(clip), load_processor(clip), tasks, config)
    args = MultiTaskTrainingArguments(
        output_dir=output,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=int(images) // int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=5,
        grouping_steps=4,
        grouping_snapshots=2,
        snapshot_images=5,
        save_strategy="no",
    )
    trainer = MultiTaskTrainer(model=classifier, args=args)
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        classifier.save_pretrained(output)
        trainer.save_metrics("eval", metrics)

"""What is recorded of a version and compared with later ones."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from transformers import CLIPModel

from mmap_peft import MultiTaskClassifier


def load_base(folder: Path) -> CLIPModel:
    """The base of a recorded version, in float32; its file is in half precision, to be small."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def classifier_outputs(
    classifier: MultiTaskClassifier, inputs: dict[str, torch.Tensor], task_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What a classifier computes: `logits` and `zero_shot_logits` (images, classes), `text_features` (classes of all
    tasks, dim) and the `probabilities` (images, classes) of `predict`."""
    classifier.eval()
    names = list(classifier.tasks)
    with classifier.zero_shot():
        zero_shot_logits = classifier(inputs["pixel_values"].float(), task_ids).logits
    pictures = [Image.fromarray(image.numpy()) for image in inputs["images"]]
    return {
        "logits": classifier(inputs["pixel_values"].float(), task_ids).logits,
        "zero_shot_logits": zero_shot_logits,
        "text_features": torch.cat(classifier.encode_texts(names)),
        "probabilities": classifier.predict(pictures, task=[names[task] for task in task_ids]).probabilities,
    }


@torch.no_grad()
def peft_outputs(
    model: PeftModel, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What a plain PEFT model computes: `logits_per_image` (images, texts) with and without the mask of the texts."""
    model.eval()
    texts = {"input_ids": input_ids, "pixel_values": pixel_values.float()}
    return {
        "logits_per_image": model(**texts, attention_mask=attention_mask).logits_per_image.contiguous(),
        "logits_per_image_without_mask": model(**texts).logits_per_image.contiguous(),
    }

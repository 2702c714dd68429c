"""CLIP-LoRA: LoRA for a few images of each class, with the same settings for all data sets."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from ..checking import Count, checked
from ..keywords import check_keywords
from ..tuner.model import ENCODER_LAYERS
from .peft_configs import lora_config


QUERIES_KEYS_AND_VALUES = ENCODER_LAYERS + r"\.self_attn\.(q_proj|k_proj|v_proj)"
STEPS_PER_SHOT = 500


@check_keywords(LoraConfig)
def clip_lora_config(**fields: Any) -> LoraConfig:
    r"""CLIP-LoRA (Zanella and Ben Ayed, CVPR Workshops 2024): LoRA of queries, keys and values in all layers of both
    towers, with a dropout of its input,

    $$W x + \frac{\alpha}{\sqrt{r}} B A \, \mathrm{dropout}(x)$$

    with $r$ = `r` = 2 and a dropout of `lora_dropout` = 0.25 (implementation details in section 4 of the paper) and
    $\alpha$ = `lora_alpha` = 1 (default of the authors' `run_utils.py`). That the update is divided by $\sqrt{r}$
    instead of $r$, `use_rslora=True`, is from their `loralib/layers.py`. `clip_lora_arguments` has the settings of the
    training.

    Args:
        fields: as for `peft.LoraConfig`; they replace those of the recipe.
    """
    recipe = {"r": 2, "lora_alpha": 1, "lora_dropout": 0.25, "use_rslora": True}
    return lora_config(**{"target_modules": QUERIES_KEYS_AND_VALUES, **recipe, **fields})


def clip_lora_arguments(shots: int, **fields: Any) -> dict[str, Any]:
    """The training arguments of CLIP-LoRA:
    `MultiTaskTrainingArguments(**clip_lora_arguments(shots=4, output_dir="out"))`.

    500 steps for each shot, 32 images a step, a learning rate of 2e-4 and a cosine schedule are from the paper
    (section 4); the schedule's end at 1e-6, a weight decay of 0.01, the betas 0.9 and 0.999, and that gradients are
    not clipped, from the authors' `lora.py`. The authors train one data set at a time. Their random crops and flips,
    `augment="crop+flip"`, are not among these arguments, since not all images may be mirrored.

    Args:
        shots (`int`): number of training images of each class.
        fields: other training arguments; they replace those of the recipe.

    Raises:
        ValueError: `shots` is no integer of 1 or more.
    """
    checked(shots, Count, "shots")
    return {
        "max_steps": STEPS_PER_SHOT * shots,
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "weight_decay": 1e-2,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "max_grad_norm": 0.0,
        **fields,
    }

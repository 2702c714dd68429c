"""PromptSRC: independent prompts in both towers, which stay near the frozen CLIP."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Depth
from .ivlp import IVLPConfig
from .method import Method


@dataclass
class PromptSRCConfig(IVLPConfig):
    """Settings of PromptSRC, prompting with self-regulating constraints (Khattak et al., ICCV 2023).

    The prompts are those of IVLP; a model with them computes the same. What is new is how they train: losses of
    consistency with the frozen CLIP, and a mean of the prompts of all epochs with Gaussian weights.
    `MultiTaskTrainer` does both for this method by default, with the weights of the authors' code, and for any other
    method if `MultiTaskTrainingArguments` say so; `text_consistency`, `image_consistency`, `logit_consistency`,
    `average_mean` and `average_std` are described there. The optimizer is the trainer's, AdamW (SGD in the authors'
    code), unless its arguments say otherwise.

    Args:
        depth (`int`, *optional*): number of layers of the text tower, counted from the first, that get prompts; 9 in
            the authors' code. `None`: all of them.
        num_prompts, num_vision_prompts, vision_depth: as for `IVLPConfig`.
    """

    method = Method(
        "PROMPTSRC",
        "PromptSRC",
        3e-2,
        "Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, ICCV 2023",
        {"text_consistency": 25.0, "image_consistency": 10.0, "logit_consistency": 1.0, "average_mean": 0.75},
    )

    depth: Depth | None = 9

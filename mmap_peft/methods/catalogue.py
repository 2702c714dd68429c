"""What each method is called, where it comes from, and which learning rate to try first."""

from __future__ import annotations

from typing import NamedTuple

from peft import PeftConfig


class Method(NamedTuple):
    """A method of tuning.

    Attributes:
        name: as its paper has it.
        learning_rate: of AdamW, the first to try.
        source: the paper.
    """

    name: str
    learning_rate: float
    source: str


METHODS = {  # by `peft_type`
    "MMAP": Method(
        "MmAP",
        3e-2,
        "Xin et al., MmAP: Multi-modal Alignment Prompt for Cross-domain Multi-task Learning, AAAI 2024",
    ),
    "COOP": Method("CoOp", 3e-2, "Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022"),
    "VPT": Method("VPT", 3e-2, "Jia et al., Visual Prompt Tuning, ECCV 2022"),
    "IVLP": Method("IVLP", 3e-2, "Rasheed et al., Fine-tuned CLIP Models are Efficient Video Learners, CVPR 2023"),
    "MAPLE": Method("MaPLe", 3e-3, "Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023"),
    "LINEAR_PROBE": Method(
        "Linear probe",
        1e-3,
        "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021",
    ),
    "FULL_FINE_TUNING": Method(
        "Full fine-tuning", 1e-5, "Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022"
    ),
    "BITFIT": Method(
        "BitFit",
        1e-3,
        "Ben Zaken et al., BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked "
        "Language-models, ACL 2022",
    ),
    "BOTTLENECK_ADAPTER": Method(
        "Bottleneck adapter", 1e-3, "Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019"
    ),
    "LORA": Method("LoRA", 1e-3, "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022"),
    "LN_TUNING": Method(
        "LN-tuning",
        1e-3,
        "Zhao et al., Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, ICLR 2024",
    ),
    "IA3": Method(
        "(IA)^3",
        3e-3,
        "Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, "
        "NeurIPS 2022",
    ),
}


def starting_learning_rate(config: PeftConfig) -> float:
    """The learning rate to try first with a method.

    It is no result: an order of magnitude that is usual for the method, from which to choose on validation images.

    Args:
        config (`PeftConfig`): the method's settings.

    Raises:
        ValueError: a method that this library has no rate for.
    """
    if config.peft_type not in METHODS:
        raise ValueError(
            f"There is no starting learning rate for {type(config).__name__}; methods with one are "
            f"{', '.join(METHODS)}."
        )
    return METHODS[config.peft_type].learning_rate

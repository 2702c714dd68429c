"""Configs of PEFT's own methods, for the modules of a CLIP."""

from __future__ import annotations

from typing import Any

from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig

from ..checking import check_fields
from ..keywords import check_keywords
from ..prompts.method import PEFT_KINDS, Method
from ..tuner.model import ENCODER_LAYERS


QUERIES_AND_VALUES = ENCODER_LAYERS + r"\.self_attn\.(q_proj|v_proj)"
KEYS_VALUES_AND_FEEDFORWARD = ENCODER_LAYERS + r"\.(self_attn\.k_proj|self_attn\.v_proj|mlp\.fc2)"
FEEDFORWARD = ENCODER_LAYERS + r"\.mlp\.fc2"
LAYER_NORMS = r"(.*\.)?(layer_norm\d|final_layer_norm|pre_layrnorm|post_layernorm|layernorm)"  # CLIP's own spelling

PEFT_METHODS = (
    Method("LORA", "LoRA", 1e-3, "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022"),
    Method(
        "LN_TUNING",
        "LN-tuning",
        1e-3,
        "Zhao et al., Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, ICLR 2024",
    ),
    Method(
        "IA3",
        "(IA)^3",
        3e-3,
        "Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, "
        "NeurIPS 2022",
    ),
)

# Other methods of PEFT that a classifier trains, saves and loads, with settings that have target_modules.
OTHER_PEFT_TYPES = (
    "BEFT", "BOFT", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR", "OFT", "OSF",
    "PEANUT", "PSOFT", "PVERA", "TINYLORA", "UNILORA", "VERA",
)  # fmt: skip


def _checked(config_class: type[PeftConfig], **fields: Any) -> Any:
    check_fields(config_class, fields, PEFT_KINDS)
    return config_class(**fields)


@check_keywords(LoraConfig)
def lora_config(**fields: Any) -> LoraConfig:
    r"""LoRA of queries and values in all layers (Hu et al., ICLR 2022, section 4.2): $W + \frac{\alpha}{r} B A$.

    Args:
        fields: as for `peft.LoraConfig`, such as `r` (default 8), `lora_alpha` and `target_modules`.
    """
    return _checked(LoraConfig, **{"target_modules": QUERIES_AND_VALUES, **fields})


@check_keywords(LNTuningConfig)
def ln_tuning_config(**fields: Any) -> LNTuningConfig:
    """Weights and biases of all layer norms (Zhao et al., ICLR 2024).

    Args:
        fields: as for `peft.LNTuningConfig`.
    """
    return _checked(LNTuningConfig, **{"target_modules": LAYER_NORMS, **fields})


@check_keywords(IA3Config)
def ia3_config(**fields: Any) -> IA3Config:
    r"""(IA)^3 of all layers (Liu et al., NeurIPS 2022, section 3.3): a factor for each element of keys, of values and
    of the input of the MLP's second layer, $l_k \odot K$, $l_v \odot V$ and $l_{ff} \odot \gamma(W_1 x)$.

    Args:
        fields: as for `peft.IA3Config`.
    """
    return _checked(
        IA3Config, **{"target_modules": KEYS_VALUES_AND_FEEDFORWARD, "feedforward_modules": FEEDFORWARD, **fields}
    )

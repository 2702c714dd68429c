"""Makes PEFT know the prompt methods. The only file that touches PEFT's registries.

PEFT has no hook for methods from outside: `register_peft_method` takes names of its own enum only. The three mappings
below are what it would have filled.
"""

from __future__ import annotations

from enum import Enum

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


class PromptPeftType(str, Enum):
    """The prompt methods' `peft_type`. Compares and hashes as the plain string, as PEFT's own enum does."""

    MMAP = "MMAP"
    COOP = "COOP"
    VPT = "VPT"
    IVLP = "IVLP"
    MAPLE = "MAPLE"


def register(peft_type: PromptPeftType, config_class: type, tuner_class: type) -> None:
    """Enter a prompt method into PEFT's registries, so that PEFT and transformers load its adapters.

    Args:
        peft_type (`PromptPeftType`): the method.
        config_class (`type[PromptConfig]`): its config.
        tuner_class (`type[PromptTuner]`): the tuner that puts its prompts into a model.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner_class.prefix

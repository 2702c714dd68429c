"""Makes PEFT know the methods of this library. The only file that touches PEFT's registries.

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


class MethodPeftType(str, Enum):
    """The `peft_type` of the methods that are no prompts."""

    LINEAR_PROBE = "LINEAR_PROBE"
    FULL_FINE_TUNING = "FULL_FINE_TUNING"
    BITFIT = "BITFIT"
    BOTTLENECK_ADAPTER = "BOTTLENECK_ADAPTER"


def register(peft_type: PromptPeftType | MethodPeftType, config_class: type, tuner_class: type) -> None:
    """Enter a method into PEFT's registries, so that PEFT and transformers load its adapters.

    Args:
        peft_type (`PromptPeftType` or `MethodPeftType`): the method.
        config_class (`type[PeftConfig]`): its config.
        tuner_class (`type[BaseTuner]`): the tuner that puts it into a model.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_class
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner_class.prefix

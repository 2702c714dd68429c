"""The methods that train, by the names that commands and experiments have for them."""

from __future__ import annotations

from collections.abc import Callable

from peft import PeftConfig

from ..prompts.coop import CoOpConfig
from ..prompts.ivlp import IVLPConfig
from ..prompts.maple import MaPLeConfig
from ..prompts.mmap import MmAPConfig
from ..prompts.mmrl_tokens import MMRLTokensConfig
from ..prompts.promptsrc import PromptSRCConfig
from ..prompts.vpt import VPTConfig
from .bottleneck import BottleneckAdapterConfig
from .clip_adapter import CLIPAdapterConfig
from .clip_lora import clip_lora_config
from .linear_probe import LinearProbeConfig
from .parameters import BitFitConfig, FullFineTuningConfig
from .peft_configs import ia3_config, ln_tuning_config, lora_config
from .tip_adapter import TipAdapterConfig


METHODS: dict[str, Callable[..., PeftConfig]] = {
    "mmap": MmAPConfig,
    "coop": CoOpConfig,
    "vpt": VPTConfig,
    "ivlp": IVLPConfig,
    "maple": MaPLeConfig,
    "promptsrc": PromptSRCConfig,
    "mmrl_tokens": MMRLTokensConfig,
    "linear_probe": LinearProbeConfig,
    "clip_adapter": CLIPAdapterConfig,
    "tip_adapter": TipAdapterConfig,
    "full_fine_tuning": FullFineTuningConfig,
    "bitfit": BitFitConfig,
    "bottleneck_adapter": BottleneckAdapterConfig,
    "lora": lora_config,
    "clip_lora": clip_lora_config,
    "ln_tuning": ln_tuning_config,
    "ia3": ia3_config,
}

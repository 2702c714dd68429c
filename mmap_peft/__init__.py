"""MmAP for CLIP: one frozen model, many visual tasks, and a few thousand trained parameters per task."""

from .hub.adapter_card import replace_empty_cards
from .methods.bottleneck import BottleneckAdapterConfig
from .methods.clip_adapter import CLIPAdapterConfig
from .methods.clip_lora import clip_lora_arguments, clip_lora_config
from .methods.linear_probe import LinearProbeConfig
from .methods.parameters import BitFitConfig, FullFineTuningConfig
from .methods.peft_configs import ia3_config, ln_tuning_config, lora_config
from .methods.tip_adapter import TipAdapterConfig
from .multitask.arguments import MultiTaskTrainingArguments
from .multitask.classifier import MultiTaskClassifier
from .multitask.grouping import TaskGrouping
from .multitask.loading import load_processor
from .multitask.lora_merging import merge_lora
from .multitask.output import MultiTaskOutput, Prediction, RoutedPrediction
from .multitask.plots import plot_grouping
from .multitask.task import Task
from .multitask.trainer import MultiTaskTrainer
from .multitask.wise_ft import choose_wise_ft_alpha, wise_ft
from .prompts.coop import CoOpConfig
from .prompts.ivlp import IVLPConfig
from .prompts.maple import MaPLeConfig
from .prompts.method import Method
from .prompts.mmap import MmAPConfig
from .prompts.mmrl_tokens import MMRLTokensConfig
from .prompts.promptsrc import PromptSRCConfig
from .prompts.vpt import VPTConfig
from .registration import register_method, register_methods, starting_learning_rate
from .tuner.model import PromptTuner
from .tuner.routes import make_prompts, use_routes
from .version import __version__


register_methods()
replace_empty_cards()

__all__ = [
    "BitFitConfig",
    "BottleneckAdapterConfig",
    "CLIPAdapterConfig",
    "CoOpConfig",
    "FullFineTuningConfig",
    "IVLPConfig",
    "LinearProbeConfig",
    "MMRLTokensConfig",
    "MaPLeConfig",
    "Method",
    "MmAPConfig",
    "MultiTaskClassifier",
    "MultiTaskOutput",
    "MultiTaskTrainer",
    "MultiTaskTrainingArguments",
    "Prediction",
    "PromptSRCConfig",
    "PromptTuner",
    "RoutedPrediction",
    "Task",
    "TaskGrouping",
    "TipAdapterConfig",
    "VPTConfig",
    "__version__",
    "choose_wise_ft_alpha",
    "clip_lora_arguments",
    "clip_lora_config",
    "ia3_config",
    "ln_tuning_config",
    "load_processor",
    "lora_config",
    "make_prompts",
    "merge_lora",
    "plot_grouping",
    "register_method",
    "starting_learning_rate",
    "use_routes",
    "wise_ft",
]

"""MmAP for CLIP: one frozen model, many visual tasks, and a few thousand trained parameters per task."""

from .methods.bottleneck import BottleneckAdapterConfig
from .methods.clip_adapter import CLIPAdapterConfig
from .methods.linear_probe import LinearProbeConfig
from .methods.parameters import BitFitConfig, FullFineTuningConfig
from .methods.peft_configs import ia3_config, ln_tuning_config, lora_config
from .multitask.arguments import MultiTaskTrainingArguments
from .multitask.classifier import MultiTaskClassifier
from .multitask.grouping import TaskGrouping
from .multitask.loading import load_processor
from .multitask.output import MultiTaskOutput, Prediction, RoutedPrediction
from .multitask.plots import plot_grouping
from .multitask.task import Task
from .multitask.trainer import MultiTaskTrainer
from .prompts.coop import CoOpConfig
from .prompts.ivlp import IVLPConfig
from .prompts.maple import MaPLeConfig
from .prompts.method import Method
from .prompts.mmap import MmAPConfig
from .prompts.vpt import VPTConfig
from .registration import register_method, register_methods, starting_learning_rate
from .tuner.model import PromptTuner
from .tuner.routes import make_prompts, use_routes
from .version import __version__


register_methods()

__all__ = [
    "BitFitConfig",
    "BottleneckAdapterConfig",
    "CLIPAdapterConfig",
    "CoOpConfig",
    "FullFineTuningConfig",
    "IVLPConfig",
    "LinearProbeConfig",
    "MaPLeConfig",
    "Method",
    "MmAPConfig",
    "MultiTaskClassifier",
    "MultiTaskOutput",
    "MultiTaskTrainer",
    "MultiTaskTrainingArguments",
    "Prediction",
    "PromptTuner",
    "RoutedPrediction",
    "Task",
    "TaskGrouping",
    "VPTConfig",
    "__version__",
    "ia3_config",
    "ln_tuning_config",
    "load_processor",
    "lora_config",
    "make_prompts",
    "plot_grouping",
    "register_method",
    "starting_learning_rate",
    "use_routes",
]

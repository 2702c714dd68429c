"""MmAP for CLIP: one frozen CLIP, many visual tasks, a few thousand learned numbers a task."""

from .methods.bottleneck import BottleneckAdapterConfig, BottleneckTuner
from .methods.catalogue import starting_learning_rate
from .methods.linear_probe import LinearProbeConfig, LinearProbeTuner
from .methods.parameters import BitFitConfig, FullFineTuningConfig, ParameterTuner
from .methods.peft_configs import ia3_config, ln_tuning_config, lora_config
from .multitask.arguments import MultiTaskTrainingArguments
from .multitask.classifier import MultiTaskClassifier, MultiTaskOutput, Prediction
from .multitask.grouping import TaskGrouping
from .multitask.plots import plot_grouping
from .multitask.saving import load_processor
from .multitask.task import Task
from .multitask.trainer import MultiTaskTrainer
from .prompts.coop import CoOpConfig
from .prompts.ivlp import IVLPConfig
from .prompts.maple import MaPLeConfig
from .prompts.mmap import MmAPConfig
from .prompts.vpt import VPTConfig
from .registration import MethodPeftType, PromptPeftType, register
from .tuner.model import PromptTuner
from .tuner.routing import use_routes
from .version import __version__


register(PromptPeftType.MMAP, MmAPConfig, PromptTuner)
register(PromptPeftType.COOP, CoOpConfig, PromptTuner)
register(PromptPeftType.VPT, VPTConfig, PromptTuner)
register(PromptPeftType.IVLP, IVLPConfig, PromptTuner)
register(PromptPeftType.MAPLE, MaPLeConfig, PromptTuner)
register(MethodPeftType.LINEAR_PROBE, LinearProbeConfig, LinearProbeTuner)
register(MethodPeftType.FULL_FINE_TUNING, FullFineTuningConfig, ParameterTuner)
register(MethodPeftType.BITFIT, BitFitConfig, ParameterTuner)
register(MethodPeftType.BOTTLENECK_ADAPTER, BottleneckAdapterConfig, BottleneckTuner)

__all__ = [
    "BitFitConfig",
    "BottleneckAdapterConfig",
    "CoOpConfig",
    "FullFineTuningConfig",
    "IVLPConfig",
    "LinearProbeConfig",
    "MaPLeConfig",
    "MmAPConfig",
    "MultiTaskClassifier",
    "MultiTaskOutput",
    "MultiTaskTrainer",
    "MultiTaskTrainingArguments",
    "Prediction",
    "PromptTuner",
    "Task",
    "TaskGrouping",
    "VPTConfig",
    "__version__",
    "ia3_config",
    "ln_tuning_config",
    "load_processor",
    "lora_config",
    "plot_grouping",
    "starting_learning_rate",
    "use_routes",
]

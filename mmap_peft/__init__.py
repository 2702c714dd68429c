"""MmAP for CLIP: one frozen CLIP, many visual tasks, a few thousand learned numbers a task."""

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
from .registration import PromptPeftType, register
from .tuner.model import PromptTuner
from .tuner.routing import use_routes


__version__ = "0.1.0"

register(PromptPeftType.MMAP, MmAPConfig, PromptTuner)
register(PromptPeftType.COOP, CoOpConfig, PromptTuner)
register(PromptPeftType.VPT, VPTConfig, PromptTuner)
register(PromptPeftType.IVLP, IVLPConfig, PromptTuner)
register(PromptPeftType.MAPLE, MaPLeConfig, PromptTuner)

__all__ = [
    "CoOpConfig",
    "IVLPConfig",
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
    "load_processor",
    "plot_grouping",
    "use_routes",
]

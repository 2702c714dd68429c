"""MmAP for CLIP: one frozen CLIP, many visual tasks, a few thousand learned numbers a task."""

from .multitask.arguments import MultiTaskTrainingArguments
from .multitask.classifier import MultiTaskClassifier, MultiTaskOutput, Prediction
from .multitask.grouping import TaskGrouping
from .multitask.plots import plot_grouping
from .multitask.saving import load_processor
from .multitask.task import Task
from .multitask.trainer import MultiTaskTrainer
from .prompts.mmap import MmAPConfig
from .registration import PromptPeftType, register
from .tuner.model import PromptTuner
from .tuner.routing import use_routes


__version__ = "0.1.0"

register(PromptPeftType.MMAP, MmAPConfig, PromptTuner)

__all__ = [
    "MmAPConfig",
    "MultiTaskClassifier",
    "MultiTaskOutput",
    "MultiTaskTrainer",
    "MultiTaskTrainingArguments",
    "Prediction",
    "PromptTuner",
    "Task",
    "TaskGrouping",
    "load_processor",
    "plot_grouping",
    "use_routes",
]

"""Settings of `MultiTaskTrainer`."""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import shutil
from dataclasses import dataclass, fields
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from annotated_types import Ge, Gt, Le, Lt
from transformers import SchedulerType, TrainingArguments
from transformers.hf_argparser import HfArg

from ..checking import Amount, Seed, checked
from .affinity import AFFINITIES
from .aggregation import find_aggregator
from .augmentation import AugmentationArguments
from .caching_arguments import CachingArguments
from .grouping import MODES, SEPARATED, STABLE, UNSTABLE
from .processes import cores
from .regularization_arguments import RegularizationArguments
from .task import DEFAULT_TEMPLATE


# Arguments of transformers that a classifier of many tasks cannot use: the only value that is accepted, and why.
_FIXED = {
    "label_smoothing_factor": (0.0, "the tasks have different numbers of classes, which transformers cannot smooth"),
    "neftune_noise_alpha": (None, "it adds noise to the input of a language model, but here the input is an image"),
    "batch_eval_metrics": (False, "the accuracies of the tasks are those of all images together"),
    "remove_unused_columns": (False, "images come from the tasks, whose columns are fixed"),
    "length_column_name": ("length", "images have no length; `sampling` says in which shares tasks are seen"),
    "train_sampling_strategy": ("random", "every batch holds every task; write `sampling` to choose their shares"),
    "include_num_input_tokens_seen": ("no", "images are no tokens"),
    "use_cache": (False, "nothing is generated"),
    "use_liger_kernel": (False, "Liger's kernels are for language models"),
    "liger_kernel_config": (None, "Liger's kernels are for language models"),
    "optim_target_modules": (None, "it names linear layers to train, but what trains are the adapters"),
    "bf16_full_eval": (False, "it would round the trained adapters for good; write bf16=True instead"),
    "fp16_full_eval": (False, "it would round the trained adapters for good; write fp16=True or bf16=True instead"),
    "label_names": (["labels", "task_ids"], "the accuracies need both"),
    "parallelism_config": (None, "each process holds all adapters; use DDP or FSDP (fsdp_version: 2)"),
}
# Optimizers that change a model's linear layers, or take a step during the backward pass.
_REFUSED_OPTIMIZERS = ("galore", "apollo", "lomo", "layerwise")


_AtLeast1, _AtLeast0 = Annotated[int, Ge(1)], Annotated[int, Ge(0)]
_Momentum = Annotated[float, Ge(0), Lt(1)]
# The ranges of arguments; of all others that are numbers, only the type is checked.
_RANGES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "snapshot_images",
            "max_groups",
            "eval_accumulation_steps",
            "ddp_timeout",
            "dataloader_prefetch_factor",
            "torch_empty_cache_steps",
        ),
        _AtLeast1,
    ),
    **dict.fromkeys(("grouping_steps", "grouping_snapshots", "dataloader_num_workers", "save_total_limit"), _AtLeast0),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "grouping_seconds"), Amount),
    "max_grad_norm": Amount | None,
    **dict.fromkeys(("warmup_steps", "logging_steps", "eval_steps", "save_steps", "eval_delay"), Amount),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _Momentum),
    **dict.fromkeys(("seed", "data_seed"), Seed),
    "num_train_epochs": Annotated[float, Gt(0), Le(1e9)],
    "max_steps": Annotated[int, Ge(-1), Le(2**62)],
    "grouping_threshold": str | float,
    "lr_scheduler_type": SchedulerType | str,
}
_PLAIN = {int, float, bool, str, type(None)}
_hints: Any = functools.cache(get_type_hints)


@dataclass
class MultiTaskTrainingArguments(AugmentationArguments, CachingArguments, RegularizationArguments, TrainingArguments):
    """The arguments of `transformers.TrainingArguments`, and those of training many tasks.

    A batch of `per_device_train_batch_size` images holds images of all tasks. The defaults that differ from those of
    transformers were chosen on validation images of Pictograms.

    The `help` of each argument describes it, and `HfArgumentParser` shows it.

    Raises:
        ValueError: a value that is none of the choices, or an argument of transformers that has no meaning for many
            tasks, such as `label_smoothing_factor` or `neftune_noise_alpha`.
    """

    output_dir: str = HfArg(default="out", help="Folder of checkpoints and results.")
    learning_rate: float = HfArg(default=3e-2, help="The initial learning rate.")
    per_device_train_batch_size: int = HfArg(default=32, help="Images in a batch on one device, of all tasks.")
    per_device_eval_batch_size: int = HfArg(default=128, help="Images in a batch on one device, of all tasks.")
    lr_scheduler_type: str = HfArg(default="cosine", help="The scheduler type to use.")
    num_train_epochs: float = HfArg(default=6.0, help="Epochs of stage 2, unless max_steps is given.")
    remove_unused_columns: bool = HfArg(default=False, help="Must be False: the columns are fixed.")
    logging_nan_inf_filter: bool = HfArg(
        default=False,
        help="Whether to leave losses that are not finite out of the log. It waits for the device at each step, and "
        "such a loss ends training anyway.",
    )
    sharing: str = HfArg(
        default="groups",
        help="The adapters of a task. 'groups': one of its group (see grouping) and its own; 'global+groups': one of "
        "all tasks, too; 'all': one for all tasks (-MT in the paper); 'none': only its own.",
        metadata={"choices": ["groups", "global+groups", "all", "none"]},
    )
    aggregator: str | None = HfArg(
        default=None,
        help="An aggregator of torchjd, such as 'PCGrad' or 'CAGrad(c=0.5)', which combines the gradients of tasks "
        "that share a parameter; a backward pass for each task of the largest group. None: their sum.",
    )
    grouping: str = HfArg(
        default="gradient",
        help="How tasks are grouped. 'gradient': those whose gradients point in similar directions. Controls: 'all' "
        "(one group), 'none' (one group a task), 'random', 'given'.",
        metadata={"choices": list(MODES)},
    )
    grouping_steps: int = HfArg(
        default=100,
        help="Steps of stage 1, which trains one adapter on all tasks. 0: no stage 1, so `grouping` cannot be "
        "'gradient'.",
    )
    affinity: str = HfArg(
        default="directions",
        help="How stage 1 compares two tasks. 'directions': cosine of the directions in which each would move the "
        "prompts, its gradient scaled similar to Adam's; 'cosine': of the gradients themselves, as in the paper; "
        "'early': the same in the first fifth of stage 1; 'lookahead': how much a step on one lowers the loss of the "
        "other.",
        metadata={"choices": list(AFFINITIES)},
    )
    unstable: str = HfArg(
        default="all",
        help="What is used if the groups found are not stable: a repeated measurement finds others (stability below "
        f"{STABLE:g}), or their tasks hardly agree more than others (separation below {SEPARATED:g}). 'all': one "
        "group; 'none': one group a task; 'keep': the groups found.",
        metadata={"choices": list(UNSTABLE)},
    )
    grouping_snapshots: int = HfArg(
        default=5,
        help="How often stage 1 compares gradients: evenly spaced; for 'directions' spaced by a constant factor.",
    )
    snapshot_images: int = HfArg(
        default=128,
        help="Images of each task in one snapshot, which takes about tasks * snapshot_images / (processes * "
        "per_device_train_batch_size) forward and backward passes, each no slower than a training step.",
    )
    grouping_threshold: str = HfArg(
        default="mean",
        help="Similarity above which two tasks gain from sharing a group: a number, or 'mean' (all pairs).",
    )
    max_groups: int | None = HfArg(default=None, help="Largest number of groups; for 'random' their number (None: 2).")
    grouping_seconds: float = HfArg(
        default=30.0,
        help="How long to look for the best groups at most; up to 20 tasks take a few seconds. To measure "
        "their stability takes as long again at most.",
    )
    given_groups: str | None = HfArg(default=None, help="The groups for 'given', such as 'art+clipart,product'.")
    sampling: str = HfArg(
        default="uniform",
        help="Share of each task in a batch: the same for all, or proportional to its number of images.",
        metadata={"choices": ["uniform", "proportional"]},
    )
    template: str = HfArg(
        default=DEFAULT_TEMPLATE, help="Text of a class, with {} for its name, for scripts that make tasks from files."
    )
    unreadable: str = HfArg(
        default="refuse",
        help="What to do with files that are no images: raise an error, or leave them out.",
        metadata={"choices": ["refuse", "skip"]},
    )
    dataloader_num_workers: int | None = HfArg(
        default=None,
        help="Processes that read images; 0: the training process reads them. None: one for each core, at most 8, if "
        "there is an accelerator, workers are forked, and /dev/shm has space for their batches; otherwise 0.",
    )
    dataloader_persistent_workers: bool | None = HfArg(
        default=None,
        help="Whether these processes stay for the next epoch. None: yes.",
        metadata={"nargs": "?", "const": True},
    )

    @property
    def n_gpu(self) -> int:
        """GPUs of one process: at most one, since `nn.DataParallel` copies modules without the hooks that add prompts.
        `accelerate launch --multi_gpu` uses all GPUs, and is faster."""
        return min(1, super().n_gpu)

    def __post_init__(self) -> None:
        self._check_kinds()
        accelerator = not self.use_cpu and torch.accelerator.is_available()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = self._workers() if accelerator else 0
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        self.dataloader_pin_memory &= accelerator  # a DataLoader would only warn
        super().__post_init__()
        self.label_names: list[str] = self.label_names or ["labels", "task_ids"]
        self.grouping_threshold = str(self.grouping_threshold)
        self.threshold, self.augmentation  # noqa: B018, raise early
        self._check_values()
        for error, applies in self._errors().items():
            if applies:
                raise ValueError(error)
        if self.aggregator is not None:
            find_aggregator(self.aggregator, 2 if "groups" in self.sharing else 1)

    def _check_kinds(self) -> None:
        """Raise a `ValueError` for a value of another type than its annotation, out of range, or no choice."""
        hints = _hints(type(self))
        for name in [each.name for each in fields(self)]:
            kind = _RANGES.get(name, hints[name])
            kinds = {*(get_args(hints[name]) or [hints[name]]), *get_args(kind)}
            choices = [each for each in kinds if isinstance(each, type) and issubclass(each, Enum)]
            if choices:
                kind = choices[0] | Literal[tuple(each.value for each in choices[0])]
            elif not (kinds <= _PLAIN or name in _RANGES) or kinds >= {bool, str}:
                continue  # transformers converts it
            checked(getattr(self, name), kind | None if type(None) in kinds else kind, name)

    def _check_values(self) -> None:
        """Raise a `ValueError` for values that are not allowed, too small, or would fail later or have no effect."""
        for name, (expected, reason) in _FIXED.items():
            value = getattr(self, name, expected)  # older versions of transformers lack some
            if value != expected:
                raise ValueError(f"Invalid value {value!r} for `{name}`: expected {expected!r}, since {reason}.")
        metadata = {each.name: each.metadata for each in fields(self)}
        for name in ("sharing", "grouping", "affinity", "unstable", "sampling", "unreadable"):
            value, choices = getattr(self, name), metadata[name]["choices"]
            if value not in choices:
                raise ValueError(f"{name}={value!r} is no choice; write one of {', '.join(choices)}.")

    def _errors(self) -> dict[str, Any]:
        """Errors for settings that cannot be used, or not together, each with a value that is true if it applies."""
        snapshots, steps = self.grouping_snapshots, self.grouping_steps
        too_many = self.grouping == "gradient" and self.unstable == "none" and self.max_groups is not None
        takes_model_apart = any(part in self.optim for part in _REFUSED_OPTIMIZERS)
        uploads_pickles = self.push_to_hub and "checkpoint" in self.hub_strategy
        lacks_groups = self.grouping == "given" and not self.given_groups
        lacks_steps = self.grouping == "gradient" and not 1 <= snapshots <= steps
        return {
            f"Invalid value {self.optim.value!r} for `optim`: it is for the linear layers of a whole model, not for "
            "adapters; write 'adamw_torch', say.": takes_model_apart,
            "Invalid value True for `split_batches` in `accelerator_config`: each process's part of a batch must hold "
            "every task; write per_device_train_batch_size.": self.accelerator_config.split_batches,
            "Invalid value True for `dispatch_batches` in `accelerator_config`: with augment, each process reads its "
            "own images; leave it out.": self.augmentation and self.accelerator_config.dispatch_batches,
            f"hub_strategy={self.hub_strategy.value!r} would upload the optimizer's state, which is a pickle; write "
            "'every_save' or 'end'.": uploads_pickles,
            "An aggregator would get gradients scaled for fp16; write bf16=True.": self.aggregator and self.fp16,
            f"unstable='none' may make more groups than max_groups={self.max_groups}; write unstable='all'.": too_many,
            "grouping='given' needs the groups; write given_groups='art+clipart,product', say.": lacks_groups,
            f"grouping='gradient' takes {snapshots} snapshots in {steps} steps; write grouping_steps and "
            "grouping_snapshots of 1 or more, no more snapshots than steps.": lacks_steps,
        }

    @property
    def threshold(self) -> float | str:
        """`grouping_threshold` as a number, or `"mean"`."""
        try:
            threshold = "mean" if self.grouping_threshold == "mean" else float(self.grouping_threshold)
            if isinstance(threshold, float) and not math.isfinite(threshold):
                raise ValueError
            return threshold
        except ValueError:
            raise ValueError(
                f"grouping_threshold={self.grouping_threshold!r} is no threshold; write a number, or 'mean'."
            ) from None

    @property
    def parsed_groups(self) -> list[list[str]]:
        """`given_groups` as a list of lists."""
        groups = self.given_groups.split(",") if self.given_groups else []
        return [[task.strip() for task in group.split("+")] for group in groups]

    def _workers(self) -> int:
        start = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
        if start != "fork":  # other methods import the script in each worker, which not every script allows
            return 0
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        most = max(1, min(8, cores() // processes))
        if os.path.isdir("/dev/shm"):
            # It holds two batches of each worker. In many containers it has 64 MB, and a process that needs more is
            # ended by a bus error. CLIPs take up to 336 x 336 pixels.
            batch = max(self.per_device_train_batch_size, self.per_device_eval_batch_size) * 3 * 336**2 * 4
            most = min(most, int(shutil.disk_usage("/dev/shm").free / processes // (2 * batch)))
        return most

"""Settings of `MultiTaskTrainer`."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from dataclasses import dataclass, field, fields
from typing import Optional

import torch
from transformers import TrainingArguments

from .aggregation import find_aggregator
from .grouping import MODES
from .processes import cores
from .task import DEFAULT_TEMPLATE


SHARING = ["groups", "all", "none"]

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
    "parallelism_config": (None, "adapters are kept whole on each process; use DDP or FSDP (fsdp_version: 2)"),
}
# Optimizers that take a model's linear layers apart, or step in the middle of the backward pass.
_REFUSED_OPTIMIZERS = ("galore", "apollo", "lomo", "layerwise")


@dataclass
class MultiTaskTrainingArguments(TrainingArguments):
    """The arguments of `transformers.TrainingArguments`, and those of training many tasks.

    A batch of `per_device_train_batch_size` images holds images of all tasks. The defaults that differ from those of
    transformers were chosen on validation images of Pictograms.

    Args:
        grouping (`str`): how stage 1 groups the tasks. `"gradient"` groups tasks whose gradients point in similar
            directions. `"all"` (one group), `"none"` (one group a task), `"random"` and `"given"` are controls.
        sharing (`str`): which adapters a task uses. `"groups"`: that of its group and its own. `"all"`: one that all
            tasks share (`-MT` in the paper). `"none"`: its own. Only `"groups"` has a stage 1.
        aggregator (`str`, *optional*): an aggregator of `torchjd`, such as `"PCGrad"` or `"CAGrad(c=0.5)"`: it makes
            one gradient of those of several tasks for the parameters that they share. `None`: their sum.
        grouping_steps (`int`): steps of stage 1, which trains one adapter on all tasks. With 0 there is no stage 1,
            and `grouping` cannot be `"gradient"`.
        grouping_snapshots (`int`): how many times stage 1 takes the tasks' gradients, at evenly spread steps, the last
            time at its end.
        snapshot_images (`int`): images of each task in one snapshot. A snapshot takes
            `ceil(tasks * snapshot_images / (per_device_train_batch_size * processes))` forward and backward passes,
            each no slower than a training step, and encodes the texts once (with FSDP, once a pass).
        grouping_threshold (`str`): similarity above which two tasks gain from sharing a group: a number, or `"mean"`,
            the mean over all pairs.
        max_groups (`int`, *optional*): the most groups; with `"random"`, their number (2 if not given).
        given_groups (`str`, *optional*): the groups of `"given"`, as in `"art+clipart,product"`.
        sampling (`str`): share of each task in a batch: `"uniform"`, the same for all, or `"proportional"` to its
            number of images.
        template (`str`): text of a class, with `{}` for its name, for scripts that make tasks from files.
        unreadable (`str`): what to do with files that are no images: `"refuse"` raises an error, `"skip"` leaves them
            out.
        image_cache_gb (`float`): GB (1e9 bytes) of disk in `TMPDIR` for resized images, which later epochs read again.
            Each process has one such cache for training and one for evaluation. 0: no cache.
        dataloader_num_workers (`int`, *optional*): processes that read images; with 0, the training process reads
            them. `None`: one a core, at most 8, if there is an accelerator, workers are forked, and `/dev/shm` has
            room for their batches; otherwise 0.
        dataloader_persistent_workers (`bool`, *optional*): whether these processes stay for the next epoch. `None`:
            yes.

    Raises:
        ValueError: a value that is none of the choices, or an argument of transformers that has no meaning for many
            tasks, such as `label_smoothing_factor` or `neftune_noise_alpha`.
    """

    output_dir: str = field(default="out", metadata={"help": "Where checkpoints and results go."})
    learning_rate: float = field(default=3e-2, metadata={"help": "The initial learning rate."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images of all tasks on one device."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images of all tasks on one device."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    num_train_epochs: float = field(default=6.0, metadata={"help": "Epochs of stage 2, unless max_steps is given."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: images come as they are."})
    sharing: str = field(
        default="groups",
        metadata={"help": "Whose prompts a task uses: group's and own, one for all, own alone.", "choices": SHARING},
    )
    aggregator: Optional[str] = field(
        default=None, metadata={"help": "torchjd's aggregator for shared prompts, such as 'PCGrad'. None: the sum."}
    )
    grouping: str = field(default="gradient", metadata={"help": "How tasks are grouped.", "choices": list(MODES)})
    grouping_steps: int = field(default=100, metadata={"help": "Steps of stage 1, which trains one global adapter."})
    grouping_snapshots: int = field(default=5, metadata={"help": "How often gradients are taken in stage 1."})
    snapshot_images: int = field(default=128, metadata={"help": "Images of each task that a snapshot is taken over."})
    grouping_threshold: str = field(
        default="mean",
        metadata={"help": "Similarity above which tasks gain from sharing a group; a number or 'mean'."},
    )
    max_groups: Optional[int] = field(default=None, metadata={"help": "At most so many groups."})
    given_groups: Optional[str] = field(
        default=None, metadata={"help": "Groups for --grouping given, as 'art+clipart,product'."}
    )
    sampling: str = field(
        default="uniform",
        metadata={"help": "Share of each task in a batch.", "choices": ["uniform", "proportional"]},
    )
    template: str = field(default=DEFAULT_TEMPLATE, metadata={"help": "Text of a class, with {} for its name."})
    unreadable: str = field(
        default="refuse", metadata={"help": "What to do with files that are no images.", "choices": ["refuse", "skip"]}
    )
    image_cache_gb: float = field(
        default=4.0, metadata={"help": "GB of disk in which a process keeps resized images. 0: none are kept."}
    )
    dataloader_num_workers: Optional[int] = field(
        default=None, metadata={"help": "Processes that read images. None: up to 8 on a GPU, 0 without one."}
    )
    dataloader_persistent_workers: Optional[bool] = field(
        default=None,
        metadata={"help": "Whether these processes stay for the next epoch. None: yes.", "nargs": "?", "const": True},
    )

    @property
    def n_gpu(self) -> int:
        """GPUs of one process: at most one, since `nn.DataParallel` copies modules without the hooks that add prompts.
        `accelerate launch --multi_gpu` uses all GPUs, and is faster."""
        return min(1, super().n_gpu)

    def __post_init__(self) -> None:
        accelerator = not self.use_cpu and torch.accelerator.is_available()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = self._workers() if accelerator else 0
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        self.dataloader_pin_memory &= accelerator  # a DataLoader would only warn
        super().__post_init__()
        self._check_fixed()
        if self.push_to_hub and self.hub_strategy in ("checkpoint", "all_checkpoints"):
            raise ValueError(
                f"hub_strategy={self.hub_strategy.value!r} would upload the optimizer's state, which is a pickle; "
                "write 'every_save' or 'end'."
            )
        self.grouping_threshold = str(self.grouping_threshold)
        self.threshold  # noqa: B018, raises early
        self._check_own()
        if self.aggregator is not None:
            find_aggregator(self.aggregator, 2 if self.sharing == "groups" else None)
            if self.fp16:
                raise ValueError("An aggregator sees gradients as fp16 scales them; write bf16=True instead of fp16.")
            if self.torch_empty_cache_steps is not None:
                raise ValueError("`torch_empty_cache_steps` cannot be used with an aggregator; leave it out.")
        if self.grouping == "given" and not self.given_groups:
            raise ValueError("grouping='given' needs the groups; write given_groups='art+clipart,product', say.")
        if self.grouping == "gradient" and not 1 <= self.grouping_snapshots <= self.grouping_steps:
            raise ValueError(
                f"grouping='gradient' takes {self.grouping_snapshots} snapshots in {self.grouping_steps} steps; write "
                "grouping_steps and grouping_snapshots of 1 or more, no more snapshots than steps."
            )

    def _check_own(self) -> None:
        """Refuse values that are none of the choices, or too small."""
        metadata = {each.name: each.metadata for each in fields(self)}
        for name in ("sharing", "grouping", "sampling", "unreadable"):
            value, choices = getattr(self, name), metadata[name]["choices"]
            if value not in choices:
                raise ValueError(f"{name}={value!r} is no choice; write one of {', '.join(choices)}.")
        if self.image_cache_gb < 0:
            raise ValueError(f"image_cache_gb={self.image_cache_gb} is no size; write 0 to keep no images.")
        for name, least in {"snapshot_images": 1, "grouping_steps": 0, "max_groups": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Invalid value {value} for `{name}`: expected an integer of at least {least}.")

    def _check_fixed(self) -> None:
        """Refuse arguments of transformers that would fail later, or do nothing."""
        for name, (expected, reason) in _FIXED.items():
            value = getattr(self, name, expected)  # older versions of transformers lack some
            if value != expected:
                raise ValueError(f"Invalid value {value!r} for `{name}`: expected {expected!r}, since {reason}.")
        labels = ["labels", "task_ids"]  # both reach compute_metrics
        if self.label_names not in (None, labels):
            raise ValueError(f"Invalid value {self.label_names} for `label_names`: expected {labels} or None.")
        self.label_names = labels
        if any(part in self.optim for part in _REFUSED_OPTIMIZERS):
            raise ValueError(
                f"Invalid value {self.optim.value!r} for `optim`: it is for the linear layers of a whole model, not "
                "for adapters; write 'adamw_torch', say."
            )
        if self.accelerator_config.split_batches:
            raise ValueError(
                "Invalid value True for `split_batches` in `accelerator_config`: each process's part of a batch must "
                "hold every task; write per_device_train_batch_size."
            )

    @property
    def threshold(self) -> float | str:
        """`grouping_threshold` as a number, or `"mean"`."""
        if self.grouping_threshold == "mean":
            return "mean"
        try:
            return float(self.grouping_threshold)
        except ValueError:
            raise ValueError(
                f"grouping_threshold={self.grouping_threshold!r} is no threshold; write a number, or 'mean'."
            ) from None

    @property
    def parsed_groups(self) -> list[list[str]] | None:
        """`given_groups` as a list of lists."""
        if not self.given_groups:
            return None
        return [[task.strip() for task in group.split("+")] for group in self.given_groups.split(",")]

    def _workers(self) -> int:
        start = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
        if start != "fork":  # others run a script anew in each worker, and not every script allows for it
            return 0
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        most = max(1, min(8, cores() // processes))
        if os.path.isdir("/dev/shm"):
            # Two batches of each worker wait there. In many containers it has 64 MB, and the process that goes beyond
            # ends with a bus error. CLIPs take up to 336 x 336 pixels.
            batch = max(self.per_device_train_batch_size, self.per_device_eval_batch_size) * 3 * 336**2 * 4
            most = min(most, int(shutil.disk_usage("/dev/shm").free / processes // (2 * batch)))
        return most

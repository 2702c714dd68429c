"""What is known of a classifier's training: kept with it, saved in `tasks.json`, and shown by its model card."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from importlib.metadata import version
from typing import Any

from transformers import TrainingArguments

from ..version import __version__


PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
# Where things are, what is printed and saved, and what only the machine decides.
_NOT_OF_THE_METHOD = re.compile(
    "(output_dir|run_name|project|report_to|resume_from|restore_|logging|log_|save_|hub_|push_to|trackio|dataloader_|"
    "image_cache|ddp_|fsdp|deepspeed|parallelism|accelerator|label_names|remove_unused|do_|disable_tqdm|use_cpu|"
    "local_rank|debug|skip_memory|torch_compile|torch_empty|.*_checkpointing).*"
)


@dataclass
class TrainingRecord:
    """How a classifier was trained, and how well it does. All of it is empty until a trainer fills it.

    Args:
        settings (`dict`): the seed, and training arguments that differ from the defaults of
            `MultiTaskTrainingArguments`.
        versions (`dict[str, str]`): of Python and packages.
        zero_shot, prompted (`dict[str, float]`): accuracy of each task, by its name, of the plain CLIP and with the
            prompts, between 0 and 1.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    zero_shot: dict[str, float] = field(default_factory=dict)
    prompted: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON knows them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingRecord:
        """The reverse of `to_dict`.

        Raises:
            ValueError: a field is unknown or of another kind.
        """
        try:
            record = cls(**values)
            numbers = [*record.zero_shot.values(), *record.prompted.values()]
            plain = [*record.settings.values(), *record.versions.values()]
            valid = all(isinstance(number, (int, float)) for number in numbers)
            valid = valid and all(isinstance(value, (str, int, float, type(None))) for value in plain)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"The record of training is none ({error}); leave it out.") from error
        if not valid:
            raise ValueError("The record of training holds what is no number or text; leave it out.")
        return record


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on."""
    return {
        "mmap_peft": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def changed_settings(args: TrainingArguments) -> dict[str, Any]:
    """The seed, and the arguments of the method that differ from their defaults."""
    values = args.to_dict()
    changed = {
        known.name: values[known.name]
        for known in fields(args)
        if not _NOT_OF_THE_METHOD.fullmatch(known.name) and values[known.name] != _default(known)
    }
    settings = {"seed": args.seed, **changed}
    if args.world_size > 1:
        settings["processes"] = args.world_size
    return {
        name: value if isinstance(value, (str, int, float)) else str(value)
        for name, value in settings.items()
        if not os.path.isabs(str(value))
    }


def _default(known: Field) -> Any:
    value = known.default if known.default_factory is MISSING else known.default_factory()
    return getattr(value, "value", value)  # enumerations, as to_dict has them

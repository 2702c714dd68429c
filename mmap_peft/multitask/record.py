"""Training settings and accuracies of a classifier, which are saved in `tasks.json` and shown in its model card."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import version
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from transformers import TrainingArguments

from ..checking import checked
from ..version import __version__


# Arguments about paths, logging, saving and the machine, which do not change what is learned.
_NOT_OF_THE_METHOD = re.compile(
    "(output_dir|run_name|project|report_to|resume_from|restore_|logging|log_|save_|hub_|push_to|trackio|dataloader_|"
    "image_cache|ddp_|fsdp|deepspeed|parallelism|accelerator|label_names|remove_unused|do_|disable_tqdm|use_cpu|"
    "local_rank|debug|skip_memory|torch_compile|torch_empty|.*_checkpointing).*"
)


@dataclass
class TrainingRecord:
    """Training settings and accuracies of a classifier. All fields are empty until a trainer fills them.

    Args:
        settings (`dict`): the seed, and training arguments that differ from the defaults of
            `MultiTaskTrainingArguments`.
        versions (`dict[str, str]`): versions of Python and packages.
        zero_shot, prompted (`dict[str, float]`): accuracy of each task by its name, between 0 and 1, of the plain CLIP
            and with the trained adapters.
        command (`str`, *optional*): the command that trains the same again, if it was a command.
        license (`str`, *optional*): the adapters' license, by its name on the Hub, such as `"apache-2.0"`.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    zero_shot: dict[str, float] = field(default_factory=dict)
    prompted: dict[str, float] = field(default_factory=dict)
    command: str | None = None
    license: str | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingRecord:
        """Make a record from the values of a JSON file. Raises a `ValueError` if they are not those of a record."""
        texts, accuracies = dict[str, bool | int | float | str | None], dict[str, Annotated[float, Ge(0), Le(1)]]
        kinds = {"settings": texts, "versions": texts, "zero_shot": accuracies, "prompted": accuracies}
        kinds |= {"command": str | None, "license": str | None}
        try:
            values = checked(values, dict[Literal[tuple(kinds)], Any], "training")
            return cls(**{name: checked(value, kinds[name], f"training.{name}") for name, value in values.items()})
        except ValueError as error:
            raise ValueError(
                f"The record of training is not of the form that a trainer writes; leave it out. {error}"
            ) from None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result can depend on."""
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
    python = platform.python_version()
    return {"mmap_peft": __version__, "python": python, **{name: version(name) for name in packages}}


def changed_settings(args: TrainingArguments, given: Collection[str] = ()) -> dict[str, Any]:
    """The seed, and the arguments of the method that differ from their defaults or are among those `given`."""
    values, settings = args.to_dict(), {"seed": args.seed}
    for argument in fields(args):
        default = argument.default if argument.default_factory is MISSING else argument.default_factory()
        default = getattr(default, "value", default)  # to_dict has the values of enumerations
        is_given = argument.name in given and values[argument.name] is not None
        if not _NOT_OF_THE_METHOD.fullmatch(argument.name) and (is_given or values[argument.name] != default):
            settings[argument.name] = values[argument.name]
    if args.world_size > 1:
        settings["processes"] = args.world_size
    settings = {name: value for name, value in settings.items() if not os.path.isabs(str(value))}
    return {name: value if isinstance(value, (str, int, float)) else str(value) for name, value in settings.items()}

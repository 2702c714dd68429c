"""Type, name and source of a method, and the base class of all configs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from peft import PeftConfig, TaskType
from pydantic import StringConstraints

from ..checking import Names, Pattern, check_fields, shortened


class MethodType(str):
    """A method's `peft_type`: equal to the plain string, with the `name` and `value` that PEFT's own enum has."""

    name = value = property(str.__str__)

    def __str__(self) -> str:
        # PEFT's model status shows the part after the dot.
        return f"{type(self).__name__}.{self.value}"


@dataclass(frozen=True)
class Method:
    """Describes a method.

    Attributes:
        peft_type (`str`): the method's `peft_type` in `adapter_config.json`, such as `"VPT"`. It must be unique.
        name (`str`): name as written in the paper.
        learning_rate (`float`): a first learning rate for AdamW.
        source (`str`): authors, title, conference and year of the paper.
        training (`Mapping[str, float | str]`): values of `RegularizationArguments` that belong to the method, for
            those that are `None`.
    """

    peft_type: str
    name: str
    learning_rate: float
    source: str
    training: Mapping[str, float | str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "peft_type", MethodType(self.peft_type))


Modules = Annotated[Pattern | Names | None, "a regular expression or a list of names of modules, or None"]
Rank = Annotated[int, Ge(1), Le(4096)]
Scale = Annotated[float, Gt(0), Le(1e6)]
_Iterations = Annotated[str, StringConstraints(pattern=r"^pissa_niter_\d+$"), "'pissa_niter_' with a number"]
_INITIAL_LORA = "gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga"
# What PEFT's settings can be, where its annotations leave out what it takes, or say less.
PEFT_KINDS: dict[str, Any] = {
    "peft_type": str | None,
    "task_type": Literal[tuple(map(str.__str__, TaskType))] | TaskType | None,
    "target_modules": Modules,
    "exclude_modules": Modules,
    "feedforward_modules": Modules,
    "modules_to_save": Annotated[Names | None, "a list of names of modules, or None"],
    "r": Rank,
    "rank_pattern": dict[str, Rank] | None,
    "lora_alpha": Scale,
    "alpha_pattern": dict[str, Scale] | None,
    "lora_dropout": Annotated[float, Ge(0), Lt(1)],
    "init_lora_weights": bool | Literal[_INITIAL_LORA] | _Iterations,
    "layers_to_transform": Annotated[int, Ge(0)] | list[Annotated[int, Ge(0)]] | None,
    "qalora_group_size": Annotated[int, Ge(1)],
}


@dataclass
class MethodConfig(PeftConfig):
    """Settings of a method that PEFT does not have. Each method's config sets `method`.

    A value that is not of the kind which a field's annotation says raises a `ValueError`.
    """

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        self.check_values()
        super().__post_init__()
        self.peft_type = self.method.peft_type

    def check_values(self) -> None:
        """Raise a `ValueError` if a setting is of a wrong type, outside of its range, or does not go with another."""
        check_fields(type(self), vars(self), PEFT_KINDS)


def check_config(config: Any) -> None:
    """Raise a `ValueError` if something is neither a config, of any method, with possible settings, nor `None`."""
    if isinstance(config, MethodConfig):
        config.check_values()
    elif isinstance(config, PeftConfig):
        check_fields(type(config), vars(config), PEFT_KINDS)
        copy.deepcopy(config).__post_init__()  # PEFT's own checks, again: settings may have been changed
    elif config is not None:
        raise ValueError(
            f"Invalid value {shortened(config)} for `config`: expected the config of a method, such as MmAPConfig()."
        )

"""Type, name and source of a method, and the base class of all configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftConfig


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
    """

    peft_type: str
    name: str
    learning_rate: float
    source: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "peft_type", MethodType(self.peft_type))


@dataclass
class MethodConfig(PeftConfig):
    """Settings of a method that PEFT does not have. Each method's config sets `method`."""

    method: ClassVar[Method]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method.peft_type

    def _check_positive(self, **reasons: str) -> None:
        """Raise a `ValueError` with the reason of a setting that is neither above 0 nor `None`."""
        for name, reason in reasons.items():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Invalid value: {name}={value} {reason}.")

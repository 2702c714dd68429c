"""What every method says of itself, a prompt method or another: how files and people call it, and where it is from."""

from __future__ import annotations

from dataclasses import dataclass


class MethodType(str):
    """A method's `peft_type`: a plain string that has the `name` and the `value` of PEFT's own enum.

    It compares, hashes and is written to JSON as the plain string.
    """

    @property
    def value(self) -> str:
        """The plain string."""
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        # PEFT's status of a model shows what follows the dot.
        return f"{type(self).__name__}.{self.value}"


@dataclass(frozen=True)
class Method:
    """What is known of a method of tuning, for PEFT, for model cards, and for a first run.

    Attributes:
        peft_type (`str`): the method in `adapter_config.json`, such as `"VPT"`. No other method may have it.
        name (`str`): as its paper writes it.
        learning_rate (`float`): the learning rate of AdamW to try first.
        source (`str`): authors, title, conference and year of the paper.
    """

    peft_type: str
    name: str
    learning_rate: float
    source: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "peft_type", MethodType(self.peft_type))

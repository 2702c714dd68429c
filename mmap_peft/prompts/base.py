"""What every prompt method has: a config that is saved, and a generator that turns its parameters into prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from peft import PeftConfig
from torch import nn


class TowerShape(NamedTuple):
    """Size of one tower: how many encoder layers, and the width of a token."""

    layers: int
    width: int


@dataclass
class PromptConfig(PeftConfig):
    """Settings that all prompt methods share.

    Args:
        num_prompts (`int`): prompts that a layer of a tower gets.
        depth (`int`, *optional*): how many layers, counted from the first, get prompts. `None`: all of them.
        target_modules (`str`, *optional*): regular expression of the encoder layers to hook. `None`: all encoder
            layers of all towers.
        exclude_modules (`list[str]`, *optional*): modules that `target_modules` matches but that stay as they are.
        modules_to_save (`list[str]`, *optional*): modules of the base that are trained and saved beside the prompts.
    """

    generator_class: ClassVar[type[PromptGenerator]]
    towers: ClassVar[tuple[str, ...]] = ("text", "vision")  # which of them a model may have prompts in
    stays_in_sequence: ClassVar[bool] = False  # whether prompts are tokens that later layers see, too

    num_prompts: int = field(default=4, metadata={"help": "Prompts that a layer of a tower gets."})
    depth: int | None = field(
        default=None, metadata={"help": "How many layers, counted from the first, get prompts. None: all of them."}
    )
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Regular expression of the encoder layers to hook. None: all of them."}
    )
    exclude_modules: str | list[str] | None = field(
        default=None, metadata={"help": "Modules that target_modules matches but that stay as they are."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the base that are trained and saved beside the prompts."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts={self.num_prompts} gives a layer no prompt; write 1 or more.")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth={self.depth} gives no layer a prompt; write 1 or more, or None for all layers.")

    @property
    def placeholders(self) -> int:
        """How many tokens after the first of a text give their places to prompts."""
        return self.num_prompts if self.stays_in_sequence and "text" in self.towers else 0

    def check(self, towers: Mapping[str, TowerShape]) -> None:
        """Raise a `ValueError` if the settings do not fit a model with these towers."""
        if not set(self.towers) & set(towers):
            raise ValueError(
                f"{type(self).__name__} puts prompts into the {' and '.join(self.towers)} tower, but the model has "
                f"only {' and '.join(towers)}; give a model that has it, or another method."
            )
        deepest = max(shape.layers for shape in towers.values())
        if self.depth is not None and self.depth > deepest:
            raise ValueError(
                f"depth={self.depth} is more than the {deepest} layers of the model; write at most {deepest}, or None "
                "for all layers."
            )


class PromptGenerator(nn.Module, ABC):
    """Holds the parameters of one adapter and makes its prompts. Knows nothing of CLIP or of tasks.

    The prompts of layer l are added to the tokens that enter layer l, after the first token. What becomes of them after
    the layer is the method's policy, `PromptConfig.stays_in_sequence`: they are removed again, or stay in the sequence,
    where the prompts of the next prompted layer replace them.

    Args:
        config (`PromptConfig`): the adapter's settings, which fit `towers`.
        towers (`Mapping[str, TowerShape]`): the towers that get prompts, by name (`"text"`, `"vision"`).

    Attributes:
        depths (`dict[str, int]`): for each tower, how many layers get prompts.
        position (`str`): where class names stand among text prompts that replace words: `"end"`, `"middle"`, `"front"`.
    """

    position = "end"

    def __init__(self, config: PromptConfig, towers: Mapping[str, TowerShape]) -> None:
        super().__init__()
        # Plain values, not the config: a saved or copied module must not hold a config.
        self.stays_in_sequence = config.stays_in_sequence
        self.depths = {
            name: min(self._depth(config, name) or shape.layers, shape.layers) for name, shape in towers.items()
        }

    def _depth(self, config: PromptConfig, tower: str) -> int | None:
        return config.depth

    @abstractmethod
    def forward(self, tower: str) -> torch.Tensor:
        """All prompts of a tower, shape (depth, prompts, width).

        Those of text may differ from class to class: (depth, classes, prompts, width).
        """

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
    rides: ClassVar[bool] = False  # whether prompts take places among the tokens and ride on from layer to layer

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
        return self.num_prompts if self.rides and "text" in self.towers else 0

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

    Prompts of layer l stand beside the tokens that enter layer l. Those of a method that `rides` enter before the
    positions of the text and the first norm of the images, if l is 0, and are still there after layer l.

    Args:
        config (`PromptConfig`): the adapter's settings, which fit `towers`.
        towers (`Mapping[str, TowerShape]`): the towers that get prompts, by name (`"text"`, `"vision"`).
    """

    def __init__(self, config: PromptConfig, towers: Mapping[str, TowerShape]) -> None:
        super().__init__()
        # Plain numbers, not the config: a saved or copied module must not drag a config along.
        self.rides = config.rides
        self.depths = {
            name: min(self._depth(config, name) or shape.layers, shape.layers) for name, shape in towers.items()
        }

    def _depth(self, config: PromptConfig, tower: str) -> int | None:
        return config.depth

    @abstractmethod
    def layer_prompts(self, tower: str, layer: int) -> torch.Tensor:
        """Prompts of one layer, shape (prompts, width), for a layer below the tower's depth.

        Those of text may differ from class to class: (classes, prompts, width).
        """

    def prompts(self, tower: str, layer: int) -> torch.Tensor | None:
        """Prompts of one layer, shape (prompts, width), or `None` if that layer of that tower has none."""
        return self.layer_prompts(tower, layer) if layer < self.depths.get(tower, 0) else None

    def forward(self, tower: str) -> torch.Tensor:
        """All prompts of a tower, shape (depth, prompts, width)."""
        return torch.stack([self.layer_prompts(tower, layer) for layer in range(self.depths[tower])])

"""What methods share whose prompts are tokens themselves: CoOp, VPT, IVLP, MaPLe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from .base import PromptConfig, PromptGenerator, TowerShape


@dataclass
class RidingConfig(PromptConfig):
    """Settings of prompts that ride on.

    In a text the prompts of the first layer take the places of the tokens after the first one, so texts need as many
    words before the class name: `"X X X X cat."` or `"a photo of a cat."` for four prompts. They get the positions of
    those tokens. Among the tokens of an image they stand without position. The prompts of a deeper layer take the
    places of those that came out of the layer before.

    Args:
        init_std (`float`): standard deviation of a prompt's elements at the start.
        init_ids (`list[int]`, *optional*): token ids of words, as many as prompts, whose embeddings are the first
            layer's text prompts at the start; `[]`: at random. `MultiTaskClassifier` takes those of "a photo of a"
            for up to four prompts if this is `None`.
    """

    rides: ClassVar[bool] = True

    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of a prompt's elements at the start."})
    init_ids: list[int] | None = field(
        default=None, metadata={"help": "Token ids of the words that the first layer's text prompts start from."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_ids and len(self.init_ids) != self.num_prompts:
            raise ValueError(
                f"init_ids={self.init_ids} are {len(self.init_ids)} words for {self.num_prompts} prompts; write as "
                "many, or [] to start at random."
            )


class RidingGenerator(PromptGenerator):
    """Makes prompts of independent parameters: `text_prompts` and `vision_prompts`, (depth, prompts, width) each.

    Args:
        config (`RidingConfig`): the adapter's settings.
        towers (`Mapping[str, TowerShape]`): the towers that get prompts.
    """

    position = "end"

    def __init__(self, config: RidingConfig, towers: Mapping[str, TowerShape]) -> None:
        super().__init__(config, towers)
        self.init_ids = config.init_ids
        for name, shape in towers.items():
            size = self.depths[name], self._count(config, name), shape.width
            self.register_parameter(f"{name}_prompts", nn.Parameter(torch.empty(size).normal_(std=config.init_std)))

    def _count(self, config: RidingConfig, tower: str) -> int:
        return config.num_prompts

    def layer_prompts(self, tower: str, layer: int) -> torch.Tensor:
        return getattr(self, f"{tower}_prompts")[layer]

    @torch.no_grad()
    def start_from_words(self, embedding: nn.Embedding) -> None:
        """Let the first layer's text prompts be the embeddings of `init_ids`, if there are any."""
        if self.init_ids and "text" in self.depths:
            self.layer_prompts("text", 0).copy_(embedding.weight[self.init_ids])

"""What CoOp, VPT, IVLP and MaPLe share: their prompts stay in the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .base import PromptConfig, PromptGenerator, TowerShape


class SequencePromptGenerator(PromptGenerator):
    """Makes prompts of independent parameters: `text_prompts` and `vision_prompts`, (depth, prompts, width) each."""

    def __init__(self, config: SequencePromptConfig, towers: Mapping[str, TowerShape]) -> None:
        super().__init__(config, towers)
        self.init_ids = config.init_ids
        for tower, shape in towers.items():
            prompts = torch.empty(self._size(config, tower, shape.width)).normal_(std=config.init_std)
            self.register_parameter(f"{tower}_prompts", nn.Parameter(prompts))

    def _size(self, config: SequencePromptConfig, tower: str, width: int) -> tuple[int, ...]:
        return self.depths[tower], config.tower_settings(tower)[0], width

    def forward(self, tower: str) -> torch.Tensor:
        return getattr(self, f"{tower}_prompts")

    @torch.no_grad()
    def start_from_words(self, embedding: nn.Embedding) -> None:
        """Set the first layer's text prompts to the embeddings of `init_ids`, if there are any."""
        if self.init_ids and "text" in self.depths:
            ids = torch.tensor(self.init_ids, device=embedding.weight.device)
            self("text")[0].copy_(embedding(ids))


@dataclass
class SequencePromptConfig(PromptConfig):
    """Settings of prompts that stay in the sequence.

    In a text, the first layer's prompts replace the tokens after the first one and get their positions. So a text
    needs as many words before the class name: `"X X X X cat."` or `"a photo of a cat."` for four prompts. In an image,
    prompts are added after the first token and have no position. A deeper layer's prompts replace the outputs that
    the layer before has at the prompts' places.

    Args:
        init_std (`float`): standard deviation of a prompt's elements at the start.
        init_ids (`list[int]`, *optional*): token ids of words, one for each prompt, whose embeddings are the first
            layer's text prompts at the start; `[]`: a random start. With `None`, `MultiTaskClassifier` takes the words
            "a photo of a" for up to four prompts.
    """

    generator_class: ClassVar[type[PromptGenerator]] = SequencePromptGenerator
    stays_in_sequence: ClassVar[bool] = True

    init_std: float = 0.02
    init_ids: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_ids and len(self.init_ids) != self.num_prompts:
            raise ValueError(
                f"Invalid value: init_ids={self.init_ids} are {len(self.init_ids)} words for {self.num_prompts} "
                "prompts; expected one for each prompt, or [] to start at random."
            )

"""What methods share whose prompts stay in the sequence: CoOp, VPT, IVLP, MaPLe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from .base import PromptConfig, PromptGenerator, TowerShape


@dataclass
class SequencePromptConfig(PromptConfig):
    """Settings of prompts that stay in the sequence.

    In a text, the prompts of the first layer replace the tokens after the first one and get their positions. So texts
    need as many words before the class name: `"X X X X cat."` or `"a photo of a cat."` for four prompts. In an image,
    prompts are added after the first token and have no position. The prompts of a deeper layer replace the prompts that
    came out of the layer before.

    Args:
        init_std (`float`): standard deviation of a prompt's elements at the start.
        init_ids (`list[int]`, *optional*): token ids of words, as many as prompts, whose embeddings are the first
            layer's text prompts at the start; `[]`: at random. `MultiTaskClassifier` takes those of "a photo of a"
            for up to four prompts if this is `None`.
    """

    stays_in_sequence: ClassVar[bool] = True

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


class SequencePromptGenerator(PromptGenerator):
    """Makes prompts of independent parameters: `text_prompts` and `vision_prompts`, (depth, prompts, width) each.

    Args:
        config (`SequencePromptConfig`): the adapter's settings.
        towers (`Mapping[str, TowerShape]`): the towers that get prompts.
    """

    def __init__(self, config: SequencePromptConfig, towers: Mapping[str, TowerShape]) -> None:
        super().__init__(config, towers)
        self.init_ids = config.init_ids
        for name, shape in towers.items():
            size = self.depths[name], self._count(config, name), shape.width
            self.register_parameter(f"{name}_prompts", nn.Parameter(torch.empty(size).normal_(std=config.init_std)))

    def _count(self, config: SequencePromptConfig, tower: str) -> int:
        return config.num_prompts

    @property
    def first_text_prompts(self) -> torch.Tensor:
        """The text prompts of the first layer, (prompts, width)."""
        return self.text_prompts[0]

    def forward(self, tower: str) -> torch.Tensor:
        return getattr(self, f"{tower}_prompts")

    @torch.no_grad()
    def start_from_words(self, embedding: nn.Embedding) -> None:
        """Set the first layer's text prompts to the embeddings of `init_ids`, if there are any."""
        if self.init_ids and "text" in self.depths:
            ids = torch.tensor(self.init_ids, device=embedding.weight.device)
            self.first_text_prompts.copy_(embedding(ids))

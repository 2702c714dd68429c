"""A prompt method in one file: one prompt for all layers of both towers, in the narrower tower's width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from mmap_peft import Method, register_method
from mmap_peft.prompts.base import PromptConfig, PromptGenerator, TowerShape


class SharedPromptGenerator(PromptGenerator):
    """Holds `shared` (prompts, narrower width), which is filled up with zeros for the wider tower."""

    def __init__(self, config: SharedPromptConfig, towers: Mapping[str, TowerShape]) -> None:
        super().__init__(config, towers)
        self.widths = {name: shape.width for name, shape in towers.items()}
        self.shared = nn.Parameter(0.1 * torch.randn(config.num_prompts, min(self.widths.values())))

    def forward(self, tower: str) -> torch.Tensor:
        prompts = F.pad(self.shared, (0, self.widths[tower] - self.shared.shape[1]))
        return prompts.expand(self.depths[tower], -1, -1)


@register_method
@dataclass
class SharedPromptConfig(PromptConfig):
    """Settings of the method."""

    method: ClassVar[Method] = Method("ONE_PROMPT", "Shared prompts", 2e-2, "A. Author, Shared prompts, 2030")
    generator_class: ClassVar[type[PromptGenerator]] = SharedPromptGenerator

"""MaPLe: the vision prompts are linear projections of the text prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .base import SequencePromptConfig, SequencePromptGenerator, TowerShape
from .method import Method


class MaPLeGenerator(SequencePromptGenerator):
    r"""Makes MaPLe prompts: the text prompts are parameters, and one linear map for each layer, the coupling function,
    makes the vision prompts from them (equations 5 to 9 of the paper):

    $$\tilde P_l = W_l P_l + b_l$$

    with $P_l$ = `text_prompts[l]` (prompts, d_text), $W_l$ = `proj_weight[l]` (d_vision, d_text) and $b_l$ =
    `proj_bias[l]` (d_vision). Both enter before each layer $l$ below the depth. As in the authors' code, the couplings
    of all layers but the first start as copies of one.
    """

    def __init__(self, config: MaPLeConfig, towers: Mapping[str, TowerShape]) -> None:
        layers, text, vision = min(shape.layers for shape in towers.values()), towers["text"], towers["vision"]
        super().__init__(config, {"text": TowerShape(layers, text.width)})
        depth = self.depths["text"]
        self.depths = dict.fromkeys(towers, depth)
        first, deeper = nn.Linear(text.width, vision.width), nn.Linear(text.width, vision.width)
        couplings = [first, *[deeper] * (depth - 1)]
        self.proj_weight = nn.Parameter(torch.stack([coupling.weight.detach() for coupling in couplings]))
        self.proj_bias = nn.Parameter(torch.stack([coupling.bias.detach() for coupling in couplings]))

    def forward(self, tower: str) -> torch.Tensor:
        if tower == "text":
            return self.text_prompts
        return torch.baddbmm(self.proj_bias[:, None], self.text_prompts, self.proj_weight.transpose(1, 2))


@dataclass
class MaPLeConfig(SequencePromptConfig):
    """Settings of MaPLe, Multi-modal Prompt Learning (Khattak et al., CVPR 2023).

    Args:
        depth (`int`, *optional*): number of layers of each tower, counted from the first, that get prompts. `None`:
            all layers of the tower with fewer layers.
    """

    method = Method("MAPLE", "MaPLe", 3e-3, "Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023")
    generator_class = MaPLeGenerator
    needs_all_towers = True

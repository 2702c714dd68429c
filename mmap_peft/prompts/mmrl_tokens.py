"""The representation tokens of MMRL, without its representation features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import nn

from .base import Deviation, FirstLayer, PromptConfig, PromptGenerator, TowerShape
from .method import Method


class MMRLTokensGenerator(PromptGenerator):
    r"""Makes the tokens of layer $l$ of a tower $t$ from tokens that all layers of both towers share:

    $$R_t^l = R \, (W_t^l)^\top + b_t^l, \qquad l = J, \dots, L$$

    with $R$ = `tokens` (prompts, size), $W_t^l$ = `text_weight[l - J]` (d_text, size) or `vision_weight[l - J]`
    (d_vision, size), and $b_t^l$ = `text_bias[l - J]` or `vision_bias[l - J]`. As in the authors' code, the maps of
    all layers of a tower start as copies of one.
    """

    def __init__(self, config: MMRLTokensConfig, towers: Mapping[str, TowerShape]) -> None:
        super().__init__(config, towers)
        self.tokens = nn.Parameter(torch.empty(config.num_prompts, config.token_size).normal_(std=config.init_std))
        for tower, shape in towers.items():
            start = nn.Linear(config.token_size, shape.width)
            for name, part in start.named_parameters():
                copies = torch.stack([part.detach()] * self.depths[tower])
                self.register_parameter(f"{tower}_{name}", nn.Parameter(copies))

    def forward(self, tower: str) -> torch.Tensor:
        weight, bias = getattr(self, f"{tower}_weight"), getattr(self, f"{tower}_bias")
        return self.tokens @ weight.transpose(1, 2) + bias[:, None]


@dataclass
class MMRLTokensConfig(PromptConfig):
    """Settings of the representation tokens of MMRL, Multi-Modal Representation Learning (Guo and Gu, CVPR 2025).

    This is a part of MMRL. At every layer from `first_layer` on, the tokens stand after the first token of a text or
    an image, and their outputs are dropped. Features and logits are those that the authors' code calls
    `image_features`, `text_features` and `logits`, with which it classifies new classes. `MultiTaskTrainer` adds its
    regularization, one minus the cosine of each of these features with that of the frozen CLIP, with its default
    weight of 1 (0.01 to 7, by data set, in the authors' code).

    Left out are MMRL's representation features: the mean output of the tokens in the last layer of the vision tower,
    with a projection of its own. So there is no cross entropy of these (weight 0.3), and that of `logits` has a weight
    of 1 instead of 0.7, beside which the regularization weighs 0.7 times as much as theirs. Logits are not added to
    those of these features for the classes of training. Accuracies of MMRL are not to be expected.

    Args:
        num_prompts (`int`): number of tokens.
        token_size (`int`): size of the shared tokens.
        first_layer (`int`): number of the first layer with tokens, counted from 0; the authors count from 1.
        depth: `None`: the tokens enter up to the last layer.
        init_std (`float`): standard deviation of the initial values of the shared tokens.
    """

    method = Method(
        "MMRL_TOKENS",
        "MMRL tokens",
        1e-3,
        "A part of Guo and Gu, MMRL: Multi-Modal Representation Learning for Vision-Language Models, CVPR 2025",
        {"text_consistency": 1.0, "image_consistency": 1.0, "feature_distance": "cosine", "frozen_texts": "task"},
    )
    generator_class = MMRLTokensGenerator

    num_prompts: Annotated[int, Ge(1), Le(1024)] = 5
    token_size: Annotated[int, Ge(1), Le(100_000)] = 512
    first_layer: FirstLayer = 5
    init_std: Deviation = 0.02

    def check_values(self) -> None:
        super().check_values()
        if self.depth is not None:
            raise ValueError(f"depth={self.depth} is not MMRL, whose tokens enter up to the last layer; write None.")

"""MmAP: the prompts of all layers of both towers are computed from one source prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import nn

from .base import Deviation, PromptConfig, PromptGenerator, TowerShape
from .method import Method


class MmAPGenerator(PromptGenerator):
    r"""Makes MmAP prompts: layer k of tower t gets

    $$P_t^k = W_t^k \otimes P_s$$

    with $P_s$ = `source` (m, n), shared by all layers and towers, and $W_t^k$ = `scale_text[k]` (b/m, d_text/n) or
    `scale_vision[k]` (b/m, d_vision/n); $\otimes$ is the Kronecker product, so that $P_t^k$ is (b, d_t). These
    tensors, three for two towers, hold `m * n + b * (K_text * d_text + K_vision * d_vision) / (m * n)` parameters.
    """

    def __init__(self, config: MmAPConfig, towers: Mapping[str, TowerShape]) -> None:
        super().__init__(config, towers)
        rows, columns = config.source_shape
        # An element of a prompt is the product of two factors with this standard deviation.
        std = config.init_std**0.5
        # Not of both signs: elements that nearly cancel each other learn little in the first epochs.
        self.source = nn.Parameter(torch.empty(rows, columns).normal_(std=std).abs_())
        for name, shape in towers.items():
            scale = torch.empty(self.depths[name], config.num_prompts // rows, shape.width // columns)
            self.register_parameter(f"scale_{name}", nn.Parameter(scale.normal_(std=std)))

    def forward(self, tower: str) -> torch.Tensor:
        return torch.kron(getattr(self, f"scale_{tower}"), self.source[None])  # of all layers at once


Side = Annotated[int, Ge(1), Le(100_000)]


@dataclass
class MmAPConfig(PromptConfig):
    """Settings of MmAP, the Multi-modal Alignment Prompt (Xin et al., AAAI 2024).

    The paper does not give values for these settings. The defaults are choices of this library, made by measurement.

    Args:
        num_prompts (`int`): b, the number of prompts in each layer of a tower.
        source_shape (`tuple[int, int]`): (m, n), shape of the source prompt. m must divide b, and n the widths of both
            towers. A larger source means fewer parameters.
        init_std (`float`): standard deviation of the initial values of the prompts. Those of the source are
            positive, so that they do not cancel each other.
    """

    method = Method(
        "MMAP",
        "MmAP",
        3e-2,
        "Xin et al., MmAP: Multi-modal Alignment Prompt for Cross-domain Multi-task Learning, AAAI 2024",
    )
    generator_class = MmAPGenerator

    source_shape: Annotated[tuple[Side, Side], "two integers of 1 or more, (m, n)"] = (2, 2)
    init_std: Deviation = 0.02  # at 0 they would get no gradient

    def __post_init__(self) -> None:
        if isinstance(self.source_shape, list):  # read from JSON
            self.source_shape = tuple(self.source_shape)
        super().__post_init__()

    def check_values(self) -> None:
        super().check_values()
        self._check_divides("m", self.source_shape[0], "num_prompts=", self.num_prompts)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        values = super().from_json_file(path_json_file, **kwargs)
        return {name: tuple(value) if name == "source_shape" else value for name, value in values.items()}

    def check(self, towers: Mapping[str, TowerShape]) -> None:
        super().check(towers)
        for name, shape in towers.items():
            self._check_divides("n", self.source_shape[1], f"the {name} tower's width ", shape.width)

    def _check_divides(self, symbol: str, divisor: int, name: str, number: int) -> None:
        if number % divisor:
            raise ValueError(
                f"Invalid value: source_shape={self.source_shape} has {symbol}={divisor}, which does not divide "
                f"{name}{number}; expected a {symbol} that does."
            )

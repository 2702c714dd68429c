"""CoOp: learned context words in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le

from .base import Depth, SequencePromptConfig, SequencePromptGenerator
from .method import Method


class CoOpGenerator(SequencePromptGenerator):
    r"""Makes CoOp's context: the text of class $i$ is

    $$t_i = [V]_1 [V]_2 \dots [V]_M [\mathrm{CLASS}]_i$$

    with $[V]_m$ = `text_prompts[m]`, (M, width), or `text_prompts[i, m]`, (classes, M, width), if class-specific:
    equations 2 and 3 of the paper.
    """

    def _size(self, config: CoOpConfig, tower: str, width: int) -> tuple[int, ...]:
        classes = () if config.num_classes is None else (config.num_classes,)
        return *classes, config.num_prompts, width

    def forward(self, tower: str) -> torch.Tensor:
        return self.text_prompts[None]


@dataclass
class CoOpConfig(SequencePromptConfig):
    """Settings of CoOp, Context Optimization (Zhou et al., IJCV 2022).

    Args:
        first_layer, depth (`int`): 0 and 1, since CoOp's prompts enter before the first layer only.
        position (`str`): position of the class name: at the `"end"` of the prompts, in their `"middle"`, or in
            `"front"` of them. The last two need texts like `"X X X X cat."`: a placeholder for each prompt, the name,
            and a full stop.
        num_classes (`int`, *optional*): number of classes, each of which gets prompts of its own. Row i of a text
            batch uses those of class i, unless `use_routes(..., classes=[...])` is used. `None`: all classes share
            the prompts.
    """

    method = Method("COOP", "CoOp", 3e-2, "Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022")
    generator_class = CoOpGenerator
    towers = ("text",)

    depth: Depth | None = 1
    position: Literal["end", "middle", "front"] = "end"
    num_classes: Annotated[int, Ge(1), Le(100_000)] | None = None

    def check_values(self) -> None:
        super().check_values()
        if self.depth != 1:
            raise ValueError(f"depth={self.depth} is not CoOp, whose prompts enter once; write 1, or use IVLPConfig.")
        if self.first_layer:
            raise ValueError(
                f"first_layer={self.first_layer} is not CoOp, whose prompts are words; write 0, or use IVLPConfig."
            )

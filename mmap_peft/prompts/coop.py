"""CoOp: learned context words in the text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import SequencePromptConfig, SequencePromptGenerator
from .method import Method


POSITIONS = ("end", "middle", "front")


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
        depth (`int`): 1, since CoOp's prompts enter before the first layer only.
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

    depth: int | None = 1
    position: str = "end"
    num_classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive(num_classes="is no number of classes; expected an integer of 1 or more, or None")
        if self.depth != 1:
            raise ValueError(f"depth={self.depth} is not CoOp, whose prompts enter once; write 1, or use IVLPConfig.")
        if self.position not in POSITIONS:
            raise ValueError(f"position={self.position!r} is no choice; write one of {', '.join(POSITIONS)}.")

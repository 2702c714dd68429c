"""CoOp: context words of the text are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from .base import PromptGenerator, TowerShape
from .method import Method
from .sequence import SequencePromptConfig, SequencePromptGenerator


POSITIONS = ("end", "middle", "front")


@dataclass
class CoOpConfig(SequencePromptConfig):
    """Settings of CoOp, Context Optimization (Zhou et al., IJCV 2022).

    Args:
        num_prompts (`int`): context tokens.
        depth (`int`): 1, since CoOp's prompts enter before the first layer only.
        position (`str`): where the class name stands: at the `"end"`, in the `"middle"` (with half of the context
            before it), or in `"front"`. The last two need texts like `"X X X X cat."`: as many placeholders as
            prompts, the name, and one token, the full stop.
        num_classes (`int`, *optional*): makes the context class-specific: so many contexts, of which row i of a text
            batch uses the i-th, unless `use_routes(..., classes=[...])` says otherwise. `None`: one for all classes.
    """

    method: ClassVar[Method] = Method(
        "COOP", "CoOp", 3e-2, "Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022"
    )
    towers: ClassVar[tuple[str, ...]] = ("text",)

    depth: int | None = field(default=1, metadata={"help": "1: prompts enter before the first layer only."})
    position: str = field(default="end", metadata={"help": "Place of the class name.", "choices": list(POSITIONS)})
    num_classes: int | None = field(
        default=None, metadata={"help": "How many contexts, one a class. None: one for all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method.peft_type
        if self.depth != 1:
            raise ValueError(f"depth={self.depth} is not CoOp, whose prompts enter once; write 1, or use IVLPConfig.")
        if self.position not in POSITIONS:
            raise ValueError(f"position={self.position!r} is no choice; write one of {', '.join(POSITIONS)}.")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes={self.num_classes} is no number of classes; write 1 or more, or None.")


class CoOpGenerator(SequencePromptGenerator):
    r"""Makes CoOp's context: the text of class $i$ is

    $$t_i = [V]_1 [V]_2 \dots [V]_M [\mathrm{CLASS}]_i$$

    with $[V]_m$ = `text_prompts[m]`, (M, width), or `text_prompts[i, m]`, (classes, M, width), if class-specific.

    Source: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, equations 2 and 3.
    """

    def __init__(self, config: CoOpConfig, towers: Mapping[str, TowerShape]) -> None:
        PromptGenerator.__init__(self, config, towers)
        self.init_ids, self.position = config.init_ids, config.position
        classes = () if config.num_classes is None else (config.num_classes,)
        size = *classes, config.num_prompts, towers["text"].width
        self.text_prompts = nn.Parameter(torch.empty(size).normal_(std=config.init_std))

    @property
    def first_text_prompts(self) -> torch.Tensor:
        return self.text_prompts

    def forward(self, tower: str) -> torch.Tensor:
        return self.text_prompts[None]


CoOpConfig.generator_class = CoOpGenerator

"""IVLP: independent prompts in both towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from .base import TowerShape
from .method import Method
from .sequence import SequencePromptConfig, SequencePromptGenerator


@dataclass
class IVLPConfig(SequencePromptConfig):
    """Settings of IVLP, independent vision-language prompting (Rasheed et al., CVPR 2023; the baseline of MaPLe).

    Args:
        num_prompts (`int`): prompts of a layer of the text tower.
        depth (`int`, *optional*): layers of the text tower that get prompts. `None`: all.
        num_vision_prompts (`int`, *optional*): prompts of a layer of the vision tower. `None`: as many as of text.
        vision_depth (`int`, *optional*): layers of the vision tower that get prompts. `None`: as for text.
    """

    method: ClassVar[Method] = Method(
        "IVLP", "IVLP", 3e-2, "Rasheed et al., Fine-tuned CLIP Models are Efficient Video Learners, CVPR 2023"
    )

    num_vision_prompts: int | None = field(
        default=None, metadata={"help": "Prompts of a layer of the vision tower. None: as many as of text."}
    )
    vision_depth: int | None = field(
        default=None, metadata={"help": "Layers of the vision tower that get prompts. None: as for text."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method.peft_type
        for name in ("num_vision_prompts", "vision_depth"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is none; write 1 or more, or None for as in text.")

    def check(self, towers: Mapping[str, TowerShape]) -> None:
        super().check(towers)
        if self.vision_depth is not None and "vision" in towers and self.vision_depth > towers["vision"].layers:
            raise ValueError(
                f"vision_depth={self.vision_depth} is more than the {towers['vision'].layers} layers of the vision "
                "tower; write at most as many."
            )


class IVLPGenerator(SequencePromptGenerator):
    r"""Makes prompts of both towers, which know nothing of each other: $P_l$ = `text_prompts[l]` in the text tower and
    `vision_prompts[l]` in the vision tower, each put in before layer $l$ below its tower's depth, where they stay in
    the sequence.

    Source: Khattak et al., "MaPLe: Multi-modal Prompt Learning", CVPR 2023, section 4.2, and its code.
    """

    def _depth(self, config: IVLPConfig, tower: str) -> int | None:
        return config.vision_depth or config.depth if tower == "vision" else config.depth

    def _count(self, config: IVLPConfig, tower: str) -> int:
        return config.num_vision_prompts or config.num_prompts if tower == "vision" else config.num_prompts


IVLPConfig.generator_class = IVLPGenerator

"""IVLP: independent prompts in both towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .base import Depth, PromptCount, SequencePromptConfig, TowerShape
from .method import Method


@dataclass
class IVLPConfig(SequencePromptConfig):
    r"""Settings of IVLP, independent vision-language prompting (Rasheed et al., CVPR 2023), as in section 4.2 and
    the code of MaPLe (Khattak et al., CVPR 2023).

    The prompts of the towers do not depend on each other: $P_l$ = `text_prompts[l]` in the text tower and
    `vision_prompts[l]` in the vision tower enter before each layer $l$ below the tower's depth.

    Args:
        num_prompts, depth: as for `PromptConfig`, of the text tower.
        num_vision_prompts, vision_depth (`int`, *optional*): the same of the vision tower. `None`: as for text.
    """

    method = Method(
        "IVLP", "IVLP", 3e-2, "Rasheed et al., Fine-tuned CLIP Models are Efficient Video Learners, CVPR 2023"
    )

    num_vision_prompts: PromptCount | None = None
    vision_depth: Depth | None = None

    def tower_settings(self, tower: str) -> tuple[int, int | None]:
        if tower == "vision":
            return self.num_vision_prompts or self.num_prompts, self.vision_depth or self.depth
        return super().tower_settings(tower)

    def check(self, towers: Mapping[str, TowerShape]) -> None:
        super().check(towers)
        if "vision" in towers:
            self._check_depth("vision_depth", towers["vision"].layers)

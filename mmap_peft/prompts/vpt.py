"""VPT: prompts in the vision tower alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .method import Method
from .sequence import SequencePromptConfig, SequencePromptGenerator


@dataclass
class VPTConfig(SequencePromptConfig):
    """Settings of VPT, Visual Prompt Tuning (Jia et al., ECCV 2022), as CLIP's vision tower has it in the code of
    Khattak et al. (CVPR 2023).

    Args:
        num_prompts (`int`): prompts of a layer.
        depth (`int`, *optional*): 1 is VPT-Shallow; `None`, prompts in all layers, is VPT-Deep.
    """

    method: ClassVar[Method] = Method("VPT", "VPT", 3e-2, "Jia et al., Visual Prompt Tuning, ECCV 2022")
    towers: ClassVar[tuple[str, ...]] = ("vision",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.method.peft_type


class VPTGenerator(SequencePromptGenerator):
    r"""Makes VPT prompts: with $E_l$ the tokens of the image and $x_l$ the class token before layer $l$,

    $$[x_{l+1}, Z_{l+1}, E_{l+1}] = L_l([x_l, P_l, E_l])$$

    for $l < D$, the depth, where $P_l$ = `vision_prompts[l]`; from there on with $Z_l$, what came out at the prompts'
    places, instead of $P_l$. $P_0$ passes the norm before the first layer, as tokens do.

    Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, equations 4 to 7.
    """


VPTConfig.generator_class = VPTGenerator

"""VPT: prompts in the vision tower only."""

from __future__ import annotations

from dataclasses import dataclass

from .base import SequencePromptConfig
from .method import Method


@dataclass
class VPTConfig(SequencePromptConfig):
    r"""Settings of VPT, Visual Prompt Tuning (Jia et al., ECCV 2022), as CLIP's vision tower has it in the code of
    Khattak et al. (CVPR 2023). With $E_l$ the tokens of the image and $x_l$ the class token before layer $l$,

    $$[x_{l+1}, Z_{l+1}, E_{l+1}] = L_l([x_l, P_l, E_l])$$

    for $l < D$, the depth, where $P_l$ = `vision_prompts[l]`. Layers from $D$ on get $Z_l$, the outputs of the layer
    before at the prompts' places (equations 4 to 7 of the paper). $P_0$ passes the norm before the first layer, too.

    Args:
        depth (`int`, *optional*): 1 is VPT-Shallow; `None`, prompts in all layers, is VPT-Deep.
    """

    method = Method("VPT", "VPT", 3e-2, "Jia et al., Visual Prompt Tuning, ECCV 2022")
    towers = ("vision",)

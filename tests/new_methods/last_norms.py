"""A method without prompts in one file: the last norm of the vision tower trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmap_peft import Method, register_method
from mmap_peft.methods.parameters import ParameterConfig


@register_method
@dataclass
class LastNormConfig(ParameterConfig):
    """Settings of the method."""

    method: ClassVar[Method] = Method("LAST_NORM", "Last norm", 5e-3, "A. Author, Last norms, 2030")

    parameters: str = field(default=r"vision_model\.post_layernorm\..*")

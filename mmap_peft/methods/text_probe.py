"""A linear classifier of a task on top of its prompts."""

from __future__ import annotations

import torch
from torch import nn


class TextProbe(nn.Module):
    r"""Classifies a unit image feature $x$ of a task by

    $$\tau (T + s D) x + s c$$

    with $T$ (classes, dim), the unit text features of the task's classes, which its prompts make; $D$ = `delta`
    (classes, dim) and $c$ = `bias` (classes), which start at zero; $s$ = `scale`, a constant, and CLIP's temperature
    $\tau$. So it starts exactly as the text features after the prompts, at whatever point of a training it is added,
    and the prompts of both towers keep their gradients, since $T$ changes with them. Both train with one learning
    rate: for Adam, to multiply a parameter by s is the same as to multiply its learning rate by s.

    The form is this library's, after two sources: a probe that starts from text features (Wortsman et al., "Robust
    fine-tuning of zero-shot models", CVPR 2022, section 2), and a trained residual of text features (Yu et al., "Task
    Residual for Tuning Vision-Language Models", CVPR 2023).

    Args:
        classes (`int`), dim (`int`): number of the task's classes, and of the elements of a feature.
        scale (`float`): s.
        device (`torch.device`, *optional*): where the parameters are, in float32.
    """

    def __init__(self, classes: int, dim: int, scale: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.delta = nn.Parameter(torch.zeros(classes, dim, device=device))
        self.bias = nn.Parameter(torch.zeros(classes, device=device))

    def forward(self, text_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight, (classes, dim), and bias, (classes), given the unit text features, (classes, dim)."""
        return text_features + self.scale * self.delta, self.scale * self.bias

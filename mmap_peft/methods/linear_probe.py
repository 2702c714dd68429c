"""The linear probe: a linear classifier of each task on the frozen image features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..prompts.method import Method
from .pooled import PooledConfig, PooledModule, TextFeatures, Weights


class LinearProbe(PooledModule):
    """A task's probe: `weight`, (classes, dim), and `bias`, (classes)."""

    weights_from_texts = False

    def __init__(self, config: LinearProbeConfig, text_features: torch.Tensor) -> None:
        super().__init__(config, text_features)
        self.weight = nn.Parameter(text_features.float().clone())  # float32, on a base of half precision too
        self.bias = nn.Parameter(torch.zeros(len(text_features), device=text_features.device))

    def class_weights(self, text_features: TextFeatures) -> Weights:
        return self.weight, self.bias


@dataclass
class LinearProbeConfig(PooledConfig):
    r"""Settings of the linear probe: task t classifies a unit image feature $x$ by

    $$\tau W_t x + b_t$$

    with $W_t$ (classes, dim), which starts as the unit text features of the task's classes, $b_t$ (classes), which
    starts at zero, and CLIP's own temperature $\tau$ = exp(`logit_scale`), which is frozen like both towers. So it
    starts exactly as the zero-shot classifier. Each task has its own probe, with `classes * (dim + 1)` parameters.

    Source: Radford et al., ICML 2021, section 3.2 for the probe; Wortsman et al., "Robust fine-tuning of zero-shot
    models", CVPR 2022, section 2 for its start.
    """

    method = Method(
        "LINEAR_PROBE",
        "Linear probe",
        1e-3,
        "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021",
    )
    module_class = LinearProbe

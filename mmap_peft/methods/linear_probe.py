"""The linear probe: a linear classifier of each task on the frozen image features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..prompts.method import Method, MethodConfig


def start_probe(features: torch.Tensor) -> nn.Linear:
    """A task's probe. Its weight is initialized with the unit text features of the task's classes, (classes, dim)."""
    classes, dim = features.shape
    probe = nn.Linear(dim, classes, device=features.device)  # float32, on a base of half precision too
    with torch.no_grad():
        probe.weight.copy_(features)
        probe.bias.zero_()
    return probe


class LinearProbeTuner:
    """Registered with PEFT for the linear probe. It raises a `ValueError`, since a probe does not change the CLIP."""

    prefix = "linear_probe_"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "A linear probe classifies a CLIP's features and changes nothing in it, so PEFT cannot load it; write "
            "MultiTaskClassifier(clip, processor, tasks, LinearProbeConfig()), or its from_pretrained."
        )


@dataclass
class LinearProbeConfig(MethodConfig):
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
    tuner_class = LinearProbeTuner

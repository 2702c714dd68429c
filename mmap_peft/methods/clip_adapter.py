"""CLIP-Adapter: a small network on pooled features, mixed with the features themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import nn
from torch.nn import functional as F

from ..prompts.method import Method
from .pooled import PooledConfig, PooledModule, TextFeatures, Weights


Ratio = Annotated[float, Gt(0), Le(1)]


class CLIPAdapter(PooledModule):
    """A task's networks, `image` and, if there is a `text_ratio`, `text`."""

    def __init__(self, config: CLIPAdapterConfig, text_features: torch.Tensor) -> None:
        super().__init__(config, text_features)
        self.ratio, self.text_ratio = config.ratio, config.text_ratio
        dim, device = text_features.shape[1], text_features.device
        self.image = _network(dim, config.reduction).to(device)
        self.text = None if config.text_ratio is None else _network(dim, config.reduction).to(device)

    def image_features(self, features: torch.Tensor) -> torch.Tensor:
        return _mixed(self.image, self.ratio, features)

    def class_weights(self, text_features: TextFeatures) -> Weights:
        features = text_features()
        if self.text is None or self.text_ratio is None:
            return features, None
        return F.normalize(_mixed(self.text, self.text_ratio, features), dim=-1), None


def _network(dim: int, reduction: int) -> nn.Sequential:
    width = max(dim // reduction, 1)
    return nn.Sequential(nn.Linear(dim, width, bias=False), nn.ReLU(), nn.Linear(width, dim, bias=False), nn.ReLU())


def _mixed(network: nn.Sequential, ratio: float, features: torch.Tensor) -> torch.Tensor:
    changed = network(features.to(network[0].weight.dtype))  # not float32 if the whole classifier was cast
    return ratio * changed.float() + (1 - ratio) * features.float()


@dataclass
class CLIPAdapterConfig(PooledConfig):
    r"""Settings of CLIP-Adapter: task t classifies an image feature $f$ of the CLIP by $\tau T_t f' / |f'|$ with

    $$f' = \alpha\, \mathrm{ReLU}(V_t\, \mathrm{ReLU}(U_t f)) + (1 - \alpha) f$$

    where $U_t$ (dim / r, dim) and $V_t$ (dim, dim / r) train, $T_t$ are the unit text features of its classes, and
    $\tau$ is CLIP's temperature. Each task has its own networks, with `2 * dim * (dim // r)` parameters; that tasks do
    not share them is a choice of this library, since the paper trains on one data set at a time. The defaults of r and
    alpha are those of the published code, which has no network for texts.

    Source: Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters", IJCV 2024, section 3.2.

    Args:
        reduction (`int`): r. Of a feature with fewer elements, one is left.
        ratio (`float`): alpha, from above 0 to 1.
        text_ratio (`float`, *optional*): a second network changes the unit text features in the same way, with this
            ratio; the results are normalized. `None`: text features stay as they are.
    """

    method = Method(
        "CLIP_ADAPTER",
        "CLIP-Adapter",
        1e-3,
        "Gao et al., CLIP-Adapter: Better Vision-Language Models with Feature Adapters, IJCV 2024",
    )
    module_class = CLIPAdapter

    reduction: Annotated[int, Ge(1), Le(1024)] = 4
    ratio: Ratio = 0.2
    text_ratio: Ratio | None = None

"""The bottleneck adapter: a small network after the attention and the MLP of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from ..checking import shortened
from ..prompts.base import Deviation
from ..prompts.method import Method, MethodConfig, Modules, Rank
from ..tuner.checked import CheckedTuner
from ..tuner.fitting import check_targets
from ..tuner.model import ENCODER_LAYERS


SUBLAYER_OUTPUTS = ENCODER_LAYERS + r"\.(self_attn\.out_proj|mlp\.fc2)"


class BottleneckLayer(nn.Module, BaseTunerLayer):
    r"""A linear layer followed by adapters (section 2.1 and figure 2 of the paper):

    $$h = W_0 x + b_0, \quad A(h) = h + W_u \, \sigma(W_d h + b_d) + b_u$$

    with $W_d$, $b_d$ = `bottleneck_down` (m, d) and (m), $W_u$, $b_u$ = `bottleneck_up` (d, m) and (d), and $\sigma$
    = GELU: `2 * m * d + d + m` parameters. $W_0$ is the last layer of the attention or the MLP, so A comes before the
    residual is added. Several active adapters follow one another. Unlike in the paper, layer norms are frozen.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self._active_adapter: list[str] = []

    def add(self, adapter_name: str, config: BottleneckAdapterConfig) -> None:
        """Add an adapter with new weights."""
        width = self.get_base_layer().out_features
        self.bottleneck_down[adapter_name] = nn.Linear(width, config.bottleneck_size)
        self.bottleneck_up[adapter_name] = nn.Linear(config.bottleneck_size, width)
        for layer in (self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]):
            nn.init.trunc_normal_(layer.weight, std=config.init_std, a=-2 * config.init_std, b=2 * config.init_std)
            nn.init.zeros_(layer.bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = self.base_layer(x, *args, **kwargs)
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                inner = down(self._cast_input_dtype(hidden, down.weight.dtype))
                hidden = hidden + up(F.gelu(inner)).to(hidden.dtype)
        return hidden


class BottleneckTuner(CheckedTuner):
    """PEFT tuner that adds bottleneck adapters after linear layers, created by `get_peft_model`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    no_rows = "A bottleneck adapter changes all rows of a batch, so rows cannot have adapters of their own."
    no_merge = (
        "A bottleneck adapter has a nonlinearity, so it cannot be merged into the weights before it; keep it, or "
        "write model.unload() to get the base back."
    )
    no_weighted_sum = (
        "A weighted sum of bottleneck adapters is not an adapter that was trained; to use several one after the "
        "other, write model.base_model.set_adapter([name, other_name])."
    )

    def _check(self, model: nn.Module, adapter_name: str, config: BottleneckAdapterConfig) -> None:
        check_targets(model, config)
        for name, module in model.named_modules():
            base_layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if self._check_target_module_exists(config, name) and not hasattr(base_layer, "out_features"):
                raise ValueError(
                    f"target_modules={shortened(config.target_modules)} matches {name!r}, which is no linear layer; "
                    f"write a regular expression of those, such as {SUBLAYER_OUTPUTS!r}."
                )

    def _create_and_replace(
        self, config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, **kwargs: Any
    ) -> None:
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target)
        layer.add(adapter_name, config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)


@dataclass
class BottleneckAdapterConfig(MethodConfig):
    """Settings of the bottleneck adapter (Houlsby et al., ICML 2019).

    Args:
        bottleneck_size (`int`): m, width of the bottleneck; the paper tries 8, 64 and 256.
        init_std (`float`): standard deviation of the initial weights, which are truncated at twice its value. It is
            small, as in the paper, so that an adapter starts near the identity.
        target_modules (`str`, *optional*): regular expression of the linear layers that adapters are added after.
            `None`: the last linear layers of the attention and of the MLP, in all encoder layers of all towers, as in
            the paper. `r".*encoder\\.layers\\.\\d+\\.mlp\\.fc2"`: after the MLP only.
        exclude_modules (`str`, *optional*): modules that `target_modules` matches but that stay as they are.
    """

    method = Method(
        "BOTTLENECK_ADAPTER",
        "Bottleneck adapter",
        1e-3,
        "Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019",
    )
    tuner_class = BottleneckTuner

    bottleneck_size: Rank = 64
    init_std: Deviation = 0.01  # at 0 neither layer would get a gradient
    target_modules: Modules = None
    exclude_modules: Modules = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = self.target_modules or SUBLAYER_OUTPUTS

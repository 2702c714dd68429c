"""A tower in which nothing trains has no graph, and text features that stay the same are computed once."""

import pytest
import torch
from peft import VeraConfig

from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CLIPAdapterConfig,
    CoOpConfig,
    FullFineTuningConfig,
    IVLPConfig,
    LinearProbeConfig,
    MaPLeConfig,
    MmAPConfig,
    MMRLTokensConfig,
    MultiTaskClassifier,
    PromptSRCConfig,
    VPTConfig,
    clip_lora_config,
    ia3_config,
    ln_tuning_config,
    lora_config,
)


TEXT, VISION = r".*text_model.*layers\.\d+", r".*vision_model.*layers\.\d+"
VALUES, NORMS = r"\.self_attn\.(q_proj|v_proj)", r"\.layer_norm\d"
CONFIGS = {  # each with the towers in which it trains something
    "mmap": (MmAPConfig(source_shape=(2, 4)), "text vision"),
    "mmap, texts": (MmAPConfig(source_shape=(2, 4), target_modules=TEXT), "text"),
    "mmap, images": (MmAPConfig(source_shape=(2, 4), target_modules=VISION), "vision"),
    "mmap, images, probe": (MmAPConfig(source_shape=(2, 4), target_modules=VISION, probe=True), "vision"),
    "coop": (CoOpConfig(num_prompts=2), "text"),
    "vpt": (VPTConfig(num_prompts=2), "vision"),
    "vpt, probe": (VPTConfig(num_prompts=2, probe=True), "vision"),
    "ivlp": (IVLPConfig(num_prompts=2), "text vision"),
    "promptsrc": (PromptSRCConfig(num_prompts=2, depth=2), "text vision"),
    "maple": (MaPLeConfig(num_prompts=2), "text vision"),
    "mmrl tokens": (MMRLTokensConfig(num_prompts=2, token_size=8, first_layer=1), "text vision"),
    "linear probe": (LinearProbeConfig(), ""),
    "clip adapter": (CLIPAdapterConfig(), ""),
    "clip adapter of texts": (CLIPAdapterConfig(text_ratio=0.5), ""),
    "lora": (lora_config(), "text vision"),
    "lora, texts": (lora_config(target_modules=TEXT + VALUES), "text"),
    "lora, images": (lora_config(target_modules=VISION + VALUES, lora_dropout=0.5), "vision"),
    "lora, projection": (lora_config(target_modules="visual_projection"), "vision"),
    "clip lora": (clip_lora_config(), "text vision"),
    "ln tuning, images": (ln_tuning_config(target_modules=VISION + NORMS), "vision"),
    "ia3, texts": (ia3_config(target_modules=TEXT + r"\.mlp\.fc2", feedforward_modules=TEXT + r"\.mlp\.fc2"), "text"),
    "vera, images": (VeraConfig(target_modules=VISION + VALUES), "vision"),
    "bottleneck": (BottleneckAdapterConfig(bottleneck_size=8), "text vision"),
    "bottleneck, images": (
        BottleneckAdapterConfig(bottleneck_size=8, target_modules=VISION + r"\.mlp\.fc2"),
        "vision",
    ),
    "bitfit": (BitFitConfig(), "text vision"),
    "bitfit, texts": (BitFitConfig(parameters=r"text_model\..*bias"), "text"),
    "bitfit, images": (BitFitConfig(parameters=r"vision_model\..*bias"), "vision"),
    "full, images": (FullFineTuningConfig(parameters=r"vision_model\..*|visual_projection.*|logit_scale"), "vision"),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_a_tower_without_trained_parameters_has_no_graph(method, clip, processor, tasks):
    config, towers = CONFIGS[method]
    classifier = MultiTaskClassifier(clip, processor, tasks, config)
    if getattr(config, "probe", False):
        classifier.separate_adapters()
    classifier.train()
    passes = {"text": [], "vision": []}
    for name, projection in (("text", clip.text_projection), ("vision", clip.visual_projection)):
        projection.register_forward_hook(
            lambda module, args, output, name=name: passes[name].append(output.requires_grad)
        )
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(3, 3, 48, 48, generator=generator), torch.arange(3), torch.tensor([0, 1, 2])
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    for _ in range(3):
        classifier(*batch).loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(parameter.grad if parameter.grad is not None else 0, alpha=-1e-3)
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters)
    assert passes["vision"] == ["vision" in towers] * 3
    once = [] if method == "linear probe" else [False]
    assert passes["text"] == ([True] * 3 if "text" in towers else once)

"""How many parameters a method has, by its formula, as the page on methods says, and on ViT-B/16."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import CLIPConfig, CLIPModel

from mmap_peft import (
    CoOpConfig,
    IVLPConfig,
    MaPLeConfig,
    MmAPConfig,
    MMRLTokensConfig,
    PromptSRCConfig,
    VPTConfig,
)


TEXT, VISION, LAYERS, PROMPTS = 512, 768, 12, 4
SIZES = {
    MmAPConfig: 2 * 2 + LAYERS * PROMPTS * (TEXT + VISION) // (2 * 2),
    CoOpConfig: PROMPTS * TEXT,
    VPTConfig: LAYERS * PROMPTS * VISION,
    IVLPConfig: LAYERS * PROMPTS * (TEXT + VISION),
    PromptSRCConfig: 9 * PROMPTS * (TEXT + VISION),
    MMRLTokensConfig: 5 * 512 + (LAYERS - 5) * (TEXT + VISION) * (512 + 1),
    MaPLeConfig: LAYERS * (PROMPTS * TEXT + VISION * TEXT + VISION),
}


@pytest.mark.parametrize("config", SIZES)
def test_size(config):
    with torch.device("meta"):
        model = get_peft_model(CLIPModel(CLIPConfig(vision_config={"patch_size": 16})), config())
    assert model.get_nb_trainable_parameters()[0] == SIZES[config]
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert f"`{config.__name__}()`" in page and f"| {SIZES[config]:,} |" in page

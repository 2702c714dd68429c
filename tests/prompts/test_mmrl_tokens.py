"""MMRL's tokens: their formula, and that a CLIP with them computes what the authors' insertion gives."""

import pytest
import torch
from peft import get_peft_model

from mmap_peft import MMRLTokensConfig
from mmap_peft.prompts.base import TowerShape

from ..conftest import load_clip
from ..tuner.reference import _layer


TOWERS = {"text": TowerShape(3, 32), "vision": TowerShape(2, 48)}
CONFIG = MMRLTokensConfig(num_prompts=3, token_size=8, first_layer=1, init_std=0.5)


def with_tokens(layers, hidden, tokens, first, causal):
    """As the authors' code does: tokens stand after the first one from a layer on, and each layer replaces them."""
    for index, layer in enumerate(layers):
        if index >= first:
            rest = hidden[:, 1:] if index == first else hidden[:, 1 + tokens.shape[1] :]
            hidden = torch.cat([hidden[:, :1], tokens[index - first].expand(len(hidden), -1, -1), rest], dim=1)
        allowed = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool)
        hidden = _layer(layer, hidden, hidden.new_zeros(0, hidden.shape[-1]), allowed.tril() if causal else allowed)
    return hidden


@pytest.mark.parametrize("first", [0, 1])
def test_features_equal_the_authors_insertion(first, clip_folder, inputs):
    plain = load_clip(clip_folder)
    config = MMRLTokensConfig(num_prompts=3, token_size=8, first_layer=first, init_std=0.5)
    model = get_peft_model(load_clip(clip_folder), config).eval()
    generator = model.get_base_model().mmap.mmap_generators["default"]
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad():
        text, vision = plain.text_model, plain.vision_model
        hidden = with_tokens(text.encoder.layers, text.embeddings(ids), generator("text"), first, causal=True)
        ends = (ids == plain.config.text_config.eos_token_id).int().argmax(-1) + 3
        texts = plain.text_projection(text.final_layer_norm(hidden)[torch.arange(len(ids)), ends])
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        hidden = with_tokens(vision.encoder.layers, hidden, generator("vision"), first, causal=False)
        images = plain.visual_projection(vision.post_layernorm(hidden[:, 0]))
        found = model(**inputs)
        without = plain(**inputs)
    for one, other, before in (
        (found.text_embeds, texts, without.text_embeds),
        (found.image_embeds, images, without.image_embeds),
    ):
        torch.testing.assert_close(one, other / other.norm(dim=-1, keepdim=True), atol=1e-5, rtol=1e-4)
        assert (one - before).abs().max() > 1e-3


def test_tokens_are_linear_maps_of_the_shared_ones():
    generator = CONFIG.generator_class(CONFIG, TOWERS)
    for tower, (layers, width) in TOWERS.items():
        weight, bias = getattr(generator, f"{tower}_weight"), getattr(generator, f"{tower}_bias")
        assert weight.shape == (layers - 1, width, 8) and bias.shape == (layers - 1, width)
        with torch.no_grad():
            weight += 0.1 * torch.randn_like(weight)  # they start equal
            prompts = generator(tower)
        assert prompts.shape == (layers - 1, 3, width)
        for layer in range(layers - 1):
            expected = torch.nn.functional.linear(generator.tokens, weight[layer], bias[layer])
            torch.testing.assert_close(prompts[layer], expected)


def test_maps_of_all_layers_start_as_one_as_linear_layers_do():
    torch.manual_seed(0)
    generator = CONFIG.generator_class(CONFIG, {"text": TowerShape(3, 32)})
    assert torch.equal(generator.text_weight[0], generator.text_weight[1])
    assert generator.text_weight.abs().max() <= 1 / 8**0.5 and generator.text_weight.std() > 0.1
    big = MMRLTokensConfig(num_prompts=100, init_std=0.02)
    assert big.generator_class(big, {"text": TowerShape(12, 32)}).tokens.std().item() == pytest.approx(0.02, rel=0.05)


def test_both_towers_train_the_shared_tokens(clip, inputs):
    model = get_peft_model(clip, CONFIG)
    tokens = model.get_base_model().mmap.mmap_generators["default"].tokens
    output = model(**inputs)
    weights = torch.randn(16, generator=torch.Generator().manual_seed(0))
    for features in (output.text_embeds, output.image_embeds):
        (gradient,) = torch.autograd.grad((features @ weights).sum(), tokens, retain_graph=True)
        assert gradient.abs().max() > 1e-4


def test_tokens_up_to_some_layer_only_are_not_mmrl():
    with pytest.raises(ValueError, match="depth=2 is not MMRL, whose tokens enter up to the last layer; write None"):
        MMRLTokensConfig(depth=2)

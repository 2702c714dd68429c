"""Prompts that stay in the sequence: they replace no more than the words that are there for it."""

import pytest
import torch
from peft import get_peft_model
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from mmap_peft import CoOpConfig, IVLPConfig, MaPLeConfig, MmAPConfig, VPTConfig, use_routes

from ..conftest import tiny_clip


TEXT_METHODS = {"coop": CoOpConfig, "ivlp": IVLPConfig, "maple": MaPLeConfig}
METHODS = {"mmap": MmAPConfig, "coop": CoOpConfig, "vpt": VPTConfig, "ivlp": IVLPConfig, "maple": MaPLeConfig}


def model_of(config, attention="sdpa"):
    return get_peft_model(tiny_clip(attention), config).eval()


@pytest.mark.parametrize("method", TEXT_METHODS)
@pytest.mark.parametrize(
    ("count", "texts", "fits"),
    [
        (4, ["cat", "a photo of a small cat on a wall"], False),
        (4, ["cat", "queen"], False),
        (4, ["a photo of a cat", "X X X X queen"], True),
        (4, ["a photo of cat", "a photo of queen"], False),
        (2, ["cat", "a photo of a cat"], False),
        (1, ["cat", "queen"], False),
        (1, ["a cat", "a queen"], True),
        (1, ["a cat", "a very small queen on a wall"], True),
        (3, ["a photo of a cat", "queen on"], False),
    ],
)
def test_each_text_has_a_word_for_each_prompt(count, texts, fits, method, processor):
    """Or else its features would say nothing of it: refused, for every text of a batch, whatever its length."""
    model = model_of(TEXT_METHODS[method](num_prompts=count, init_std=0.5)).get_base_model()
    ids = processor.tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
    for order in ([0, 1], [1, 0]):
        if fits:
            one, other = model.get_text_features(ids[order]).pooler_output
            assert (one - other).abs().max() > 1e-3
        else:
            with pytest.raises(ValueError, match=f"but {count} prompts take the places of as many after the first"):
                model.get_text_features(ids[order])


@pytest.mark.parametrize("method", TEXT_METHODS)
def test_a_text_without_a_batch(method, inputs):
    model = model_of(TEXT_METHODS[method](num_prompts=2, init_std=0.5)).get_base_model()
    found = model.get_text_features(inputs["input_ids"][0]).pooler_output
    torch.testing.assert_close(found, model.get_text_features(inputs["input_ids"][:1]).pooler_output)


@pytest.mark.parametrize("depth", [1, None])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_vpt_in_later_layers_adds_prompts_and_replaces_no_patch(start, depth, inputs):
    """Layers by hand: prompts are added at the first layer that gets some."""
    layers = 3
    clip, other = (tiny_clip() for _ in range(2))
    for each in (clip, other):  # two more layers, so that some lie between
        encoder = each.vision_model.encoder
        torch.manual_seed(1)
        encoder.layers.append(type(encoder.layers[0])(each.config.vision_config).eval())
    target = rf".*vision_model.*layers\.[{start}-{layers - 1}]"
    config = VPTConfig(num_prompts=3, depth=depth, target_modules=target, init_std=0.5)
    if depth == 1 and start:
        with pytest.raises(ValueError, match="matches none of the first depth=1 layers"):
            get_peft_model(clip, config)
        return
    model = get_peft_model(clip, config).eval()
    prompts = clip.mmap.mmap_generators["default"].vision_prompts
    prompted = range(start, prompts.shape[0])
    tower = other.vision_model
    hidden, added = tower.pre_layrnorm(tower.embeddings(inputs["pixel_values"])), 0
    for index, layer in enumerate(tower.encoder.layers):
        if index in prompted:
            rows = prompts[index].expand(len(hidden), -1, -1)
            rows = tower.pre_layrnorm(rows) if index == 0 else rows
            hidden, added = torch.cat([hidden[:, :1], rows, hidden[:, 1 + added :]], dim=1), 3
        hidden = layer(hidden, None)
    expected = torch.cat([hidden[:, :1], hidden[:, 1 + added :]], dim=1)
    found = model.get_base_model().vision_model(inputs["pixel_values"]).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
def test_hidden_states_of_all_layers_hold_tokens_only(name, attention, before, inputs):
    """Whether transformers put its hooks for them on before or after the prompts came in."""
    clip = tiny_clip(attention)
    expected = tiny_clip(attention)(**inputs, output_hidden_states=True)
    if before:
        clip(**inputs, output_hidden_states=True)
    model = get_peft_model(clip, METHODS[name](num_prompts=2, init_std=0.5)).eval()
    for as_tokens in (False, True):
        clip.mmap.as_tokens = as_tokens
        found = model(**inputs, output_hidden_states=True)
        for tower in ("text_model_output", "vision_model_output"):
            shapes = [state.shape for state in found[tower].hidden_states]
            assert shapes == [state.shape for state in expected[tower].hidden_states]
        torch.testing.assert_close(
            found.vision_model_output.hidden_states[-1], found.vision_model_output.last_hidden_state
        )


@pytest.mark.parametrize("start", [0, 1])
def test_hidden_states_before_the_first_prompted_layer(start, inputs):
    expected = tiny_clip()(**inputs, output_hidden_states=True).vision_model_output.hidden_states
    config = VPTConfig(num_prompts=2, init_std=0.5, target_modules=rf".*vision_model.*layers\.[{start}-9]")
    model = get_peft_model(tiny_clip(), config).eval()
    found = model(**inputs, output_hidden_states=True).vision_model_output.hidden_states
    for state, of_base in zip(found[: start + 1], expected, strict=False):
        torch.testing.assert_close(state, of_base, atol=1e-5, rtol=1e-5)
    assert [state.shape for state in found] == [state.shape for state in expected]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_segmentation_takes_hidden_states_in_between(name, depth):
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {**size, "num_hidden_layers": 2, "vocab_size": 99, "max_position_embeddings": 12}
    vision = {**size, "num_hidden_layers": 3, "image_size": 48, "patch_size": 16}
    config = CLIPSegConfig(
        text_config={**text, "bos_token_id": 96, "eos_token_id": 98, "pad_token_id": 0},
        vision_config=vision,
        projection_dim=16,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=32,
    )
    torch.manual_seed(0)
    base = CLIPSegForImageSegmentation(config).eval()
    ids = torch.tensor([[96, 3, 4, 5, 98], [96, 6, 7, 8, 98]])
    pixels = torch.randn(2, 3, 48, 48)
    plain = base(input_ids=ids, pixel_values=pixels).logits
    given = {} if name == "coop" else {"depth": depth}
    model = get_peft_model(base, METHODS[name](num_prompts=2, init_std=0.5, **given)).eval()
    found = model(input_ids=ids, pixel_values=pixels).logits
    assert found.shape == plain.shape
    assert not torch.equal(found, plain)
    with use_routes(model, ()):
        torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, plain, atol=1e-5, rtol=1e-5)

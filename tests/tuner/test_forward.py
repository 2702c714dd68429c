import copy

import pytest
import torch
from peft import get_peft_model
from transformers import CLIPTextModel, CLIPVisionModel

from mmap_peft import MmAPConfig, use_routes

from ..conftest import tiny_clip
from . import reference


CONFIG = {"num_prompts": 4, "source_shape": (2, 4), "init_std": 0.5}


def prompted(attention="sdpa", adapters=("default",), plain=False, **fields):
    model = get_peft_model(tiny_clip(attention), MmAPConfig(**{**CONFIG, **fields}), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, MmAPConfig(**{**CONFIG, **fields}))
    model.base_model.set_requires_grad(list(adapters), True)
    model.get_base_model().mmap.as_tokens = plain
    return model.eval()


def prompts(model, tower, *adapters):
    generators = model.get_base_model().mmap.mmap_generators
    return torch.cat([generators[name](tower) for name in adapters or ("default",)], dim=1)


def gradients(value, model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(value, parameters)


def assert_gradients_close(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_the_plain_loop_over_layers(attention, padded, plain, inputs, mask):
    model = prompted(attention, plain=plain)
    given = mask if padded else None
    found = model(**inputs, attention_mask=given).logits_per_image
    expected = reference.logits(
        tiny_clip(),
        inputs["input_ids"],
        inputs["pixel_values"],
        prompts(model, "text"),
        prompts(model, "vision"),
        given,
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    assert_gradients_close(gradients((found * weights).sum(), model), gradients((expected * weights).sum(), model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_nothing(attention, inputs, mask):
    model = prompted(attention)
    padded = model(**inputs, attention_mask=mask).text_embeds
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, :length], "pixel_values": inputs["pixel_values"]}
        torch.testing.assert_close(padded[row], model(**alone).text_embeds[0], atol=1e-6, rtol=1e-5)


def test_prompts_matter_and_the_base_is_frozen(inputs):
    base, model = tiny_clip(), prompted()
    assert (model(**inputs).logits_per_image - base(**inputs).logits_per_image).abs().max() > 1e-2
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3
    assert all(".mmap.mmap_generators.default." in name for name in trained)
    assert {name.removeprefix("base_model.model.") for name in model.state_dict() if ".mmap." not in name} == set(
        base.state_dict()
    )


def test_several_active_adapters_are_concatenated(inputs):
    model = prompted(adapters=("x", "y"))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with use_routes(model, ("x", "y")):
        found = model(**inputs).logits_per_image
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    arguments = inputs["input_ids"], inputs["pixel_values"]
    expected = reference.logits(
        tiny_clip(), *arguments, prompts(model, "text", "x", "y"), prompts(model, "vision", "x", "y")
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    model.base_model.set_adapter(["x", "y"])
    assert torch.equal(model(**inputs).logits_per_image, found)


def test_two_adapters_in_a_row_are_as_one_with_all_prompts(inputs):
    """Vision has no order: routes (x, y) and (y, x) agree there. Text is causal, but prompts do not see each other's
    output, so their order does not matter there either."""
    model = prompted(adapters=("x", "y"))
    with use_routes(model, ("x", "y")):
        one = model(**inputs).logits_per_image
    with use_routes(model, ("y", "x")):
        other = model(**inputs).logits_per_image
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_with_routes_of_their_own_equal_a_forward_with_that_route_alone(attention, plain, inputs, mask):
    model = prompted(attention, adapters=("x", "y", "z"), plain=plain)
    model.base_model.set_requires_grad(["z"], False)
    routes = [("x",), ("y", "x"), ()]  # of unequal length, one without prompts
    weights = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))

    with use_routes(model, routes, text=[1, 0, 2], vision=[2, 1, 1]):
        mixed = model(**inputs, attention_mask=mask)
    total = (mixed.text_embeds * weights).sum() + (mixed.image_embeds * weights).sum()
    expected = 0
    for tower, rows in (("text_embeds", [1, 0, 2]), ("image_embeds", [2, 1, 1])):
        for row, route in enumerate(rows):
            with use_routes(model, routes[route]):
                alone = model(**inputs, attention_mask=mask)[tower][row]
            torch.testing.assert_close(mixed[tower][row], alone, atol=1e-5, rtol=1e-5)
            expected = expected + (alone * weights[row]).sum()
    assert_gradients_close(gradients(total, model), gradients(expected, model))


def test_an_empty_route_is_the_base(inputs):
    model = prompted()
    with use_routes(model, ()):
        assert torch.equal(model(**inputs).logits_per_image, tiny_clip()(**inputs).logits_per_image)


def test_wrong_routes_stop_with_a_sentence(inputs):
    model = prompted(adapters=("x", "y"))
    with (
        pytest.raises(ValueError, match="'d' is no adapter of the model; write one of x, y"),
        use_routes(model, ("d",)),
    ):
        pass
    with pytest.raises(ValueError, match="numbers from 0 to 1"), use_routes(model, [("x",), ("y",)], text=[0, 2, 1]):
        pass
    with pytest.raises(ValueError, match="has 3; write one number a row"), use_routes(model, [("x",)], vision=[0, 0]):
        model(**inputs)
    with pytest.raises(ValueError, match="not which row of the vision batch"), use_routes(model, [("x",), ("y",)]):
        model(**inputs)
    with pytest.raises(ValueError, match="has no prompts"), use_routes(tiny_clip(), ("x",)):
        pass


def test_routes_are_forgotten_after_the_block_even_after_an_error(inputs):
    model = prompted(adapters=("x", "y"))
    before = model(**inputs).logits_per_image
    with pytest.raises(RuntimeError), use_routes(model, ("y",)):
        raise RuntimeError
    assert torch.equal(model(**inputs).logits_per_image, before)


@pytest.mark.parametrize("plain", [False, True])
def test_hidden_states_hold_the_tokens_only(plain, inputs):
    model, base = prompted(plain=plain), tiny_clip()
    found = model(**inputs, output_hidden_states=True)
    plain_base = base(**inputs, output_hidden_states=True)
    for tower in ("text_model_output", "vision_model_output"):
        shapes = [state.shape for state in found[tower].hidden_states]
        assert shapes == [state.shape for state in plain_base[tower].hidden_states]
        assert not torch.equal(found[tower].hidden_states[-1], plain_base[tower].hidden_states[-1])


def test_attentions_show_tokens_first_then_prompts(inputs):
    model = prompted("eager")
    found = model(**inputs, output_attentions=True)
    length = inputs["input_ids"].shape[1]
    text, vision = found.text_model_output.attentions[0], found.vision_model_output.attentions[0]
    assert text.shape[-2:] == (length, length + 4)
    assert vision.shape[-2:] == (10, 10 + 4)
    torch.testing.assert_close(text.sum(-1), torch.ones_like(text[..., 0]))
    assert text[..., 0, length:].max() == 0  # SOS stands before the prompts
    assert text[..., 1:, length:].min() > 0
    assert vision[..., 10:].min() > 0


# Up to 5.20, transformers' layers checkpoint outside of their hooks.
LEGACY = pytest.mark.skipif(not hasattr(CLIPTextModel, "activation_checkpointing_enable"), reason="needs 5.21")


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=LEGACY)])
def test_gradient_checkpointing_changes_nothing(reentrant, inputs, mask):
    model = prompted(adapters=("x", "y"))
    routing = {"text": [1, 0, 1], "vision": [1, 1, 0]}

    def run(switched_on):
        model.train()
        if switched_on:
            clip = model.get_base_model()  # the name up to transformers 5.20, and the one since
            names = ("gradient_checkpointing_enable", "activation_checkpointing_enable")
            getattr(clip, names[hasattr(clip, names[1])])({"use_reentrant": reentrant})
        model.zero_grad()
        with use_routes(model, [("x",), ("x", "y")], **routing):
            found = model(**inputs, attention_mask=mask).logits_per_image
        found.pow(2).sum().backward()  # after the block, as a trainer does
        return found.detach(), [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    found, expected = run(False), run(True)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    assert_gradients_close(expected[1], found[1])


def test_bf16_autocast_stays_near_float32(inputs):
    model = prompted()
    exact = model(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(**inputs)
    torch.testing.assert_close(rough.image_embeds.float(), exact.image_embeds, atol=0.05, rtol=0)
    loss = rough.logits_per_image.float().sum()
    for gradient in gradients(loss, model):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


def test_switching_the_attention_of_a_wrapped_model_keeps_the_prompts(inputs):
    model = prompted("sdpa")
    before = model(**inputs).logits_per_image
    model.get_base_model().set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits_per_image, before, atol=1e-5, rtol=1e-5)
    assert model.get_base_model().text_model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("tower", "name"), [(CLIPTextModel, "text"), (CLIPVisionModel, "vision")])
def test_bare_towers(tower, name, inputs):
    clip = tiny_clip()
    bare = copy.deepcopy(getattr(clip, f"{name}_model"))
    assert isinstance(bare, tower)
    model = get_peft_model(bare, MmAPConfig(**CONFIG)).eval()
    parameters = dict(model.get_base_model().mmap.mmap_generators["default"].named_parameters())
    assert set(parameters) == {"source", f"scale_{name}"}
    if name == "text":
        found = clip.text_projection(model(input_ids=inputs["input_ids"]).pooler_output)
        expected = reference.text_features(clip, inputs["input_ids"], prompts(model, "text"))
    else:
        found = clip.visual_projection(model(pixel_values=inputs["pixel_values"]).pooler_output)
        expected = reference.image_features(clip, inputs["pixel_values"], prompts(model, "vision"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_gradients_close(gradients(found.pow(2).sum(), model), gradients(expected.pow(2).sum(), model))


def test_depth_prompts_the_first_layers_only(inputs):
    model = prompted(depth=1)

    def filled(tower, layers):
        # a layer without prompts: reference with none
        return [prompts(model, tower)[0], *[torch.zeros(0, prompts(model, tower).shape[-1])] * (layers - 1)]

    clip = tiny_clip()
    text = clip.text_model
    ids = inputs["input_ids"]
    hidden = text.embeddings(ids)
    for layer, own in zip(text.encoder.layers, filled("text", 3)):
        full = ids.shape[1] + len(own)
        hidden = reference._layer(layer, hidden, own, torch.ones(full, full, dtype=torch.bool).tril())
    ends = (ids == text.eos_token_id).int().argmax(-1)
    expected = clip.text_projection(text.final_layer_norm(hidden)[torch.arange(3), ends])
    with use_routes(model, ("default",)):
        found = model.get_base_model().get_text_features(ids).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

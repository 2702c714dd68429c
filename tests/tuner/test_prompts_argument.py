"""Prompts that are passed give what `use_routes` gives, and stay what they were."""

import dataclasses

import pytest
import torch
from peft import get_peft_model

from mmap_peft import CoOpConfig, IVLPConfig, MaPLeConfig, MmAPConfig, VPTConfig, make_prompts, use_routes

from ..conftest import tiny_clip
from .test_families import MODELS, build
from .test_families import inputs as family_inputs


CONFIGS = {
    "mmap": MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5),
    "coop": CoOpConfig(num_prompts=2, init_std=0.5),
    "coop, in front": CoOpConfig(num_prompts=2, init_std=0.5, position="front"),
    "coop, class-specific": CoOpConfig(num_prompts=2, init_std=0.5, num_classes=3),
    "vpt": VPTConfig(num_prompts=3, init_std=0.5),
    "ivlp": IVLPConfig(num_prompts=2, init_std=0.5),
    "maple": MaPLeConfig(num_prompts=2, init_std=0.5),
}
METHOD = pytest.mark.parametrize("name", CONFIGS)


def two(config, clip=None):
    model = get_peft_model(tiny_clip() if clip is None else clip, config, adapter_name="x")
    model.add_adapter("y", config)
    model.base_model.set_requires_grad(["x", "y"], True)
    return model.eval()


@METHOD
def test_passed_prompts_equal_those_of_a_block(name, inputs):
    model, rows = two(CONFIGS[name]), {"text": [1, 0, 1], "vision": [0, 0, 1]}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    routes = [("x",), ("y",)]
    with use_routes(model, routes, **rows):
        expected = model(**inputs).logits_per_image
    found = model(**inputs, prompts=make_prompts(model, routes, **rows)).logits_per_image
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(value.square().sum(), parameters) for value in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


@METHOD
def test_towers_take_them_and_a_block_does_not_matter(name, inputs):
    model = two(CONFIGS[name])
    clip, prompts = model.get_base_model(), make_prompts(model, ("y",))
    with use_routes(model, ("y",)):
        text = clip.get_text_features(inputs["input_ids"]).pooler_output
        image = clip.get_image_features(inputs["pixel_values"]).pooler_output
    with use_routes(model, ()):
        assert torch.equal(clip.get_text_features(inputs["input_ids"], prompts=prompts).pooler_output, text)
        assert torch.equal(clip.get_image_features(inputs["pixel_values"], prompts=prompts).pooler_output, image)


@METHOD
def test_they_are_frozen(name, inputs):
    model = two(CONFIGS[name])
    with torch.no_grad():
        prompts = make_prompts(model, ("y",))
        expected = model(**inputs, prompts=prompts).logits_per_image
        for parameter in model.get_base_model().mmap.parameters():
            parameter.data = parameter + 1
        assert torch.equal(model(**inputs, prompts=prompts).logits_per_image, expected)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompts.pooled = True


@pytest.mark.parametrize("family", MODELS)
def test_every_family_hands_them_to_its_layers(family):
    model = two(CONFIGS["mmap"], build(family))
    text, vision = family_inputs(family)
    with use_routes(model, ("x", "y")):
        expected = model(**text, **vision).logits_per_image
    assert torch.equal(model(**text, **vision, prompts=make_prompts(model, ("x", "y"))).logits_per_image, expected)


@METHOD
def test_without_routes_they_are_the_active_adapters(name, inputs):
    model = two(CONFIGS[name])
    model.set_adapter("y")
    expected = model(**inputs).logits_per_image
    assert torch.equal(model(**inputs, prompts=make_prompts(model)).logits_per_image, expected)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"text": [0, 0, 0]}, "write `routes`, too"),
        ({"pooled": True}, "write `routes`, too"),
        ({"routes": [("x",), ("y",)], "text": [0.5, 1.0, 0.0]}, "Invalid value of `text`: expected an integer"),
        ({"routes": [("x",), ("y",)], "vision": [[0, 1, 0]]}, "Invalid value of `vision`: expected an integer"),
        ({"routes": [("x",), ("y",)], "classes": [True, False, True]}, "Invalid value of `classes`"),
        ({"routes": [("x",), ("y",)], "txt": [0, 1, 0]}, "unexpected keyword argument 'txt'"),
        ({"routes": "yz"}, "'yz' is no adapter"),
    ],
)
def test_what_would_not_be_read_is_refused(given, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        make_prompts(two(CONFIGS["mmap"]), **given)


def test_a_name_is_a_route_of_one(inputs):
    model = two(CONFIGS["mmap"])
    model.add_adapter("long", CONFIGS["mmap"])
    expected = model(**inputs, prompts=make_prompts(model, ("long",))).logits_per_image
    with use_routes(model, "long"):
        assert torch.equal(model(**inputs).logits_per_image, expected)

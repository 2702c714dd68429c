"""Where pooled features alone are used, the last vision layer computes its first token alone."""

import pytest
import torch
from peft import get_peft_model

from mmap_peft import CoOpConfig, IVLPConfig, MaPLeConfig, MmAPConfig, VPTConfig, use_routes

from .test_families import build, inputs
from .test_forward import assert_gradients_close


MMAP = MmAPConfig(num_prompts=4, source_shape=(2, 4), init_std=0.5)
ROUTES = [("x",), ("x", "y"), ()]
CONFIGS = {
    "mmap": MMAP,
    "vpt": VPTConfig(num_prompts=4, init_std=0.5),
    "vpt_shallow": VPTConfig(num_prompts=4, depth=1, init_std=0.5),
    "ivlp": IVLPConfig(),
    "maple": MaPLeConfig(),
    "coop": CoOpConfig(),
}


def make(config=MMAP, family="clip", attention="sdpa"):
    model = get_peft_model(build(family, attention), config, adapter_name="x")
    model.add_adapter("y", config)
    model.base_model.set_requires_grad(["x", "y"], True)
    return model.eval()


def run(model, routes, rows, pooled, family="clip"):
    """Pooled features, gradients, and how many tokens come out of the last layer."""
    with use_routes(model, routes, vision=rows, pooled=pooled):
        output = model.get_image_features(**inputs(family)[1])
    weights = torch.randn(output.pooler_output.shape, generator=torch.Generator().manual_seed(0))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = ()
    if output.pooler_output.requires_grad:
        found = torch.autograd.grad((output.pooler_output * weights).sum(), parameters, materialize_grads=True)
    return output.pooler_output, found, output.last_hidden_state.shape[1]


def compare(model, routes, rows, family="clip", tokens=1):
    features, gradients, count = run(model, routes, rows, True, family)
    expected, expected_gradients, _ = run(model, routes, rows, False, family)
    assert count == tokens
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert_gradients_close(gradients, expected_gradients)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["clip", "metaclip_2", "clipseg"])
def test_mixed_routes(family, attention):
    compare(make(family=family, attention=attention), ROUTES, [0, 1, 2], family)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_method(name):
    compare(make(CONFIGS[name]), [("x",), ("y",)], [0, 1, 0])


@pytest.mark.parametrize("name", ["mmap", "vpt"])
def test_one_route(name):
    compare(make(CONFIGS[name]), ("x",), None)


def test_without_prompts():
    model = make()
    with torch.no_grad():
        features, _, count = run(model, (), None, True)
        expected, _, _ = run(model, (), None, False)
    assert count == 1
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_a_tower_that_pools_all_tokens_computes_all(family):
    compare(make(family=family), ROUTES, [0, 1, 2], family, tokens=9)


def test_the_plain_way_computes_all_tokens():
    model = make()
    model.get_base_model().mmap.as_tokens = True
    assert run(model, ("x",), None, True)[2] == 10


def test_checkpointed_layers_compute_all_tokens():
    model = make().train()
    clip = model.get_base_model()
    (getattr(clip, "activation_checkpointing_enable", None) or clip.gradient_checkpointing_enable)()
    compare(model, ROUTES, [0, 1, 2], tokens=10)


def test_nothing_is_recorded_before_the_first_prompted_layer():
    model = get_peft_model(
        build("clip"), MmAPConfig(**{**CONFIGS["mmap"].to_dict(), "target_modules": r".*vision.*layers\.1"})
    )
    recorded = []
    for layer in model.get_base_model().vision_model.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: recorded.append(output.requires_grad))
    model.get_image_features(**inputs("clip")[1])
    assert recorded == [False, True]

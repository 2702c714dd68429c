import pytest
import torch
from peft import get_peft_model

from mmap_peft import BottleneckAdapterConfig


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def formula(state, name, h):
    """A(h) = h + W_u gelu(W_d h + b_d) + b_u."""
    part = {key.split(f"{name}.bottleneck_")[1]: tensor for key, tensor in state.items() if f"{name}.bott" in key}
    inner = gelu(h @ part["down.default.weight"].T + part["down.default.bias"])
    return h + inner @ part["up.default.weight"].T + part["up.default.bias"]


@pytest.fixture
def model(clip):
    model = get_peft_model(clip, BottleneckAdapterConfig(bottleneck_size=5, init_std=0.5)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bottleneck" in name and name.endswith("bias"):
                parameter.normal_()
    return model


def test_a_layer_is_the_formula(model, clip):
    """A pre-norm layer with A behind attention and MLP, each before its residual."""
    layer, x = model.get_base_model().vision_model.encoder.layers[1], torch.randn(2, 7, 48)
    state = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        found = layer(x, None)
        with model.disable_adapter():
            after = x + formula(state, "out_proj", layer.self_attn(hidden_states=layer.layer_norm1(x))[0])
            expected = after + formula(state, "fc2", layer.mlp(layer.layer_norm2(after)))
            assert not torch.allclose(layer(x, None), expected, atol=0.1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_two_adapters_stand_behind_every_layer_and_hold_as_many_parameters_as_the_formula_says(model):
    names = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 2 * (3 + 2)  # down and up; attention and MLP; layers of text and vision
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == sum(2 * layers * (2 * 5 * d + d + 5) for layers, d in ((3, 32), (2, 48)))


def test_it_starts_near_the_identity(clip):
    torch.manual_seed(0)
    model = get_peft_model(clip, BottleneckAdapterConfig())
    weights = [p.detach() for n, p in model.named_parameters() if "bottleneck" in n and n.endswith("weight")]
    assert all(p.abs().max() <= 0.02 for p in weights)  # cut off at two standard deviations, which makes 0.88 of it
    assert torch.cat([p.flatten() for p in weights]).std() == pytest.approx(0.0088, rel=0.05)
    assert not any(p.any() for n, p in model.named_parameters() if "bottleneck" in n and n.endswith("bias"))


def test_adapters_follow_one_another_and_go_without_trace(model, clip, inputs):
    model.add_adapter("second", BottleneckAdapterConfig(bottleneck_size=3, init_std=0.5))
    layer = model.get_base_model().vision_model.encoder.layers[0].mlp.fc2
    x = torch.randn(4, 64)
    with torch.no_grad():
        first = layer(x)
        model.base_model.set_adapter("second")
        second = layer(x)
        model.base_model.set_adapter(["default", "second"])
        down, up = layer.bottleneck_down["second"], layer.bottleneck_up["second"]
        torch.testing.assert_close(layer(x), first + up(gelu(down(first))), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(second, first)
        with pytest.raises(NotImplementedError, match="has a nonlinearity, so it cannot be merged"):
            model.merge_and_unload()
    assert not any("bottleneck" in name for name in model.unload().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_of_half_precision(dtype, clip, inputs):
    model = get_peft_model(clip.to(dtype), BottleneckAdapterConfig(bottleneck_size=4))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}).logits_per_image
    assert found.dtype == dtype
    found.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_behind_the_mlp_alone(clip):
    model = get_peft_model(clip, BottleneckAdapterConfig(target_modules=r".*encoder\.layers\.\d+\.mlp\.fc2"))
    assert all(".mlp.fc2." in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bottleneck_size": 0}, "Invalid value 0 for `bottleneck_size`: expected an integer from 1"),
        ({"init_std": 0.0}, "Invalid value 0.0 for `init_std`: expected a finite number above 0"),
        ({"target_modules": r".*layer_norm1"}, "which is no linear layer; write a regular expression"),
    ],
)
def test_wrong_settings_stop_with_a_sentence(fields, sentence, clip):
    with pytest.raises(ValueError, match=sentence):
        get_peft_model(clip, BottleneckAdapterConfig(**fields))

"""Texts that begin with the same words: what the model's own forward gives, in values and gradients."""

import pytest
import torch
from peft import get_peft_model

from mmap_peft import CoOpConfig, IVLPConfig, MaPLeConfig, MmAPConfig, VPTConfig, use_routes
from mmap_peft.tuner.texts import can_share, shared_text_features

from .test_families import build
from .test_forward import assert_gradients_close


CONFIG = {"num_prompts": 4, "source_shape": (2, 4), "init_std": 0.5}
ROUTES = [("x",), ("x", "y"), ()]
# Three tasks; each has words of its own to begin with, and texts of unequal length.
IDS = torch.tensor(
    [
        [96, 3, 4, 11, 98, 0, 0],
        [96, 3, 4, 12, 13, 14, 98],
        [96, 5, 4, 15, 98, 0, 0],
        [96, 5, 4, 98, 0, 0, 0],
        [96, 6, 7, 16, 17, 98, 0],
    ]
)
ROWS = [0, 0, 1, 1, 2]


def make(family="clip", attention="sdpa", **fields):
    model = get_peft_model(build(family, attention), MmAPConfig(**{**CONFIG, **fields}), adapter_name="x")
    model.add_adapter("y", MmAPConfig(**{**CONFIG, **fields}))
    model.base_model.set_requires_grad(["x", "y"], True)
    return model.eval()


def shared(model, ids, constants=None):
    """Through the prompts of `use_routes`."""
    clip = model.get_base_model()
    prompts = clip.mmap.prompts(["text"])
    assert can_share(clip, prompts)
    return shared_text_features(clip, ids, prompts, constants)


def shares(model):
    clip = model.get_base_model()
    return can_share(clip, clip.mmap.prompts(["text"]))


def compare(model, ids, routes, rows):
    clip, found = model.get_base_model(), []
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for function in (lambda: shared(model, ids), lambda: clip.get_text_features(ids).pooler_output):
        with use_routes(model, routes, text=rows):
            features = function()
        weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
        gradients = torch.autograd.grad((features * weights).sum(), parameters, materialize_grads=True)
        found.append((features, gradients))
    (fast, shared_gradients), (plain, plain_gradients) = found
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    assert_gradients_close(shared_gradients, plain_gradients)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["clip", "metaclip_2", "clipseg"])
def test_mixed_routes(family, attention):
    compare(make(family, attention), IDS, ROUTES, ROWS)


def test_one_route():
    compare(make(), IDS[:2], ("x", "y"), None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompts_in_the_first_layer_only(attention):
    compare(make(attention=attention, depth=1), IDS, ROUTES, ROWS)


@pytest.mark.parametrize("rows", [[0], [0, 3], [2, 3]])
def test_few_texts_and_nothing_after_the_shared_words(rows):
    compare(make(), IDS[rows], ("x",), None)


def test_an_old_config_whose_end_has_the_highest_id():
    model = make()
    tower = model.get_base_model().text_model
    tower.config.eos_token_id = tower.eos_token_id = 2
    compare(model, IDS, ROUTES, ROWS)


def ride(one, other, attention="sdpa"):
    model = get_peft_model(build("clip", attention), one, adapter_name="x")
    model.add_adapter("y", other)
    model.base_model.set_requires_grad(["x", "y"], True)
    return model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [CoOpConfig, IVLPConfig, MaPLeConfig])
def test_prompts_that_ride_on(method, attention):
    fields = {"num_prompts": 2, "init_std": 0.5}
    model = ride(method(**fields), method(**fields), attention)
    tokens = []
    model.get_base_model().text_model.encoder.layers[1].mlp.register_forward_hook(
        lambda module, args, output: tokens.append(output.shape[0] * output.shape[1])
    )
    compare(model, IDS[:4], [("x",), ("y",)], [0, 0, 1, 1])
    assert tokens == [2 * 3 + 2 + 4 + 2 + 1, 4 * 7]  # two beginnings of three, and the rests; the model's own forward
    compare(model, IDS[:2], ("y",), None)


def test_prompts_that_ride_on_to_different_depths():
    fields = {"num_prompts": 2, "init_std": 0.5}
    compare(ride(IVLPConfig(depth=1, **fields), IVLPConfig(**fields)), IDS[:4], [("x",), ("y",)], [0, 0, 1, 1])


def test_prompts_that_reach_beyond_the_words_in_common():
    fields = {"num_prompts": 2, "init_std": 0.5}
    compare(ride(CoOpConfig(**fields), CoOpConfig(**fields)), IDS, [("x",), ("y",)], [0, 0, 1, 1, 1])


def test_half_precision_stays_near():
    model = make()
    with torch.no_grad(), use_routes(model, ROUTES, text=ROWS):
        exact = shared(model, IDS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = shared(model, IDS)
    assert torch.cosine_similarity(exact, rough.float()).min() > 0.99


def test_where_it_does_not_hold():
    assert not can_share(build("clip"), None)  # no prompts
    assert not shares(get_peft_model(build("siglip"), MmAPConfig(**CONFIG)))  # not causal
    assert not shares(get_peft_model(build("clip"), VPTConfig()))  # none for texts
    for field in ({"position": "front"}, {"num_classes": 3}):
        assert not shares(get_peft_model(build("clip"), CoOpConfig(**field)))
    model = make().train()
    assert shares(model)
    with model.disable_adapter():
        assert not shares(model)
    clip = model.get_base_model()
    (getattr(clip, "activation_checkpointing_enable", None) or clip.gradient_checkpointing_enable)()
    assert not shares(model)


def test_layers_before_the_first_prompted_one_run_once():
    model = make(target_modules=r".*text_model.*layers\.[12]")
    compare(model, IDS, ROUTES, ROWS)
    clip, constants, runs = model.get_base_model(), {}, []
    clip.text_model.encoder.layers[0].layer_norm1.register_forward_hook(lambda *_: runs.append(0))

    def run(**kept):
        with use_routes(model, ROUTES, text=ROWS):
            features = shared(model, IDS, **kept)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return features, torch.autograd.grad(features.square().sum(), parameters)

    expected = run()
    assert runs
    for _ in range(2):  # keeps, then takes
        runs.clear()
        torch.testing.assert_close(run(constants=constants), expected, atol=1e-6, rtol=1e-5)
    assert not runs
    with torch.no_grad():
        clip.text_model.encoder.layers[0].mlp.fc1.weight.mul_(2)
    torch.testing.assert_close(run(constants=constants), run(), atol=1e-6, rtol=1e-5)
    assert (run()[0] - expected[0]).abs().max() > 1e-3
    clip.text_model.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    with use_routes(model, ROUTES, text=ROWS):
        shared(model, IDS, constants).sum().backward()
    assert clip.text_model.encoder.layers[0].mlp.fc1.weight.grad.abs().max() > 0


def test_all_lengths_together_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("mmap_peft.tuner.texts._equally_long", lambda ends: [torch.arange(len(ends))])
    compare(make(), IDS, ROUTES, ROWS)
    compare(make(), IDS[[0, 3]], ("x",), None)

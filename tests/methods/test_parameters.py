"""Full fine-tuning and BitFit as tuners of PEFT."""

import copy
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import CLIPModel, CLIPVisionModel

from mmap_peft import BitFitConfig, FullFineTuningConfig

from ..conftest import load_clip


CONFIGS = {
    "full": FullFineTuningConfig,
    "vision tower": lambda: FullFineTuningConfig(parameters=r"vision_model\..*"),
    "bitfit": BitFitConfig,
}


@pytest.fixture(params=CONFIGS)
def make(request):
    return CONFIGS[request.param]


def disturb(model, adapter="default", spread=0.05):
    generator = torch.Generator().manual_seed(sum(map(ord, adapter)))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        for parameter in base.tuned.tuned_parameters[adapter].values():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits_per_image


def tuned(clip, config):
    model = get_peft_model(clip, config)
    return {name.split(".default.")[1].replace("/", ".") for name, p in model.named_parameters() if p.requires_grad}


def test_bitfit_tunes_every_bias_and_nothing_else(clip):
    modules = clip.named_modules()
    biases = {f"{path}.bias" for path, module in modules if isinstance(getattr(module, "bias", None), nn.Parameter)}
    assert len(biases) == 8 * (3 + 2) + 3  # 8 a layer; the norms before, behind and at the end
    assert tuned(clip, BitFitConfig()) == biases
    some = {name for name in biases if name.endswith(("q_proj.bias", "fc1.bias"))}
    assert tuned(CLIPModel(clip.config), BitFitConfig(parameters=r".*\.(q_proj|fc1)\.bias")) == some


def test_full_fine_tuning_tunes_everything(clip):
    everything = {name for name, _ in clip.named_parameters()}
    assert "logit_scale" in everything and "text_model.embeddings.token_embedding.weight" in everything
    assert tuned(clip, FullFineTuningConfig()) == everything


def test_a_step_of_full_fine_tuning_is_a_step_of_the_plain_model(clip, clip_folder, inputs):
    """Gradients by the copies are those that the plain model has by its own parameters."""
    plain, model = load_clip(clip_folder), get_peft_model(clip, FullFineTuningConfig())
    for one in (plain, model):
        one.train()(**inputs, return_loss=True).loss.backward()
    copies = model.get_base_model().tuned.tuned_parameters["default"]
    for name, parameter in plain.named_parameters():
        assert torch.equal(copies[name.replace(".", "/")].grad, parameter.grad), name


def test_what_is_tuned_equals_a_model_with_these_weights(make, clip, clip_folder, inputs):
    model, plain = disturb(get_peft_model(clip, make())), load_clip(clip_folder)
    copies = model.get_base_model().tuned.tuned_parameters["default"]
    state = {name.replace("/", "."): parameter.detach() for name, parameter in copies.items()}
    assert not plain.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(logits(model, inputs), logits(plain, inputs))
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, inputs), logits(plain, inputs))
    assert {name: tensor.tolist() for name, tensor in merged.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in plain.state_dict().items()
    }


def test_disabling_and_unloading_give_the_base_to_the_bit(make, clip, clip_folder, inputs):
    plain = load_clip(clip_folder)
    model = disturb(get_peft_model(clip, make()))
    found, expected = logits(model, inputs), logits(plain, inputs)
    assert not torch.equal(found, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), found)
    base = model.unload()
    assert torch.equal(logits(base, inputs), expected)
    assert base.state_dict().keys() == plain.state_dict().keys()
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(base.modules(), plain.modules(), strict=True))
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_several_adapters(make, clip, inputs, tmp_path, clip_folder):
    model = get_peft_model(clip, make(), adapter_name="x")
    plain = logits(model, inputs)
    disturb(model, "x")
    x = logits(model, inputs)
    model.add_adapter("y", make())
    assert torch.equal(logits(model, inputs), x)
    model.set_adapter("y")
    assert torch.equal(logits(model, inputs), plain)  # a new one starts from the base, not from another
    disturb(model, "y")
    y = logits(model, inputs)
    assert not torch.equal(x, y)
    assert all(".y." in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="Adapters x, y would each take the place"):
        model.base_model.set_adapter(["x", "y"])
    assert torch.equal(logits(model, inputs), y)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_clip(clip_folder), tmp_path / "x", adapter_name="x")
    loaded.load_adapter(tmp_path / "y", adapter_name="y")
    assert torch.equal(logits(loaded, inputs), x)
    loaded.set_adapter("y")
    assert torch.equal(logits(loaded, inputs), y)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["x"])
    assert torch.equal(logits(merged, inputs), x)
    model.delete_adapter("x")
    assert torch.equal(logits(model, inputs), y)
    assert model.get_model_status().available_adapters == ["y"]
    with pytest.warns(UserWarning, match="Adapter y was active"):
        model.add_adapter("z", make())
        model.delete_adapter("y")
    assert torch.equal(logits(model, inputs), plain)


def test_ways_to_load(make, clip, clip_folder, inputs, tmp_path):
    model = disturb(get_peft_model(clip, make()))
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert type(config) is type(make()) and config.parameters == make().parameters
    into = load_clip(clip_folder)
    into.load_adapter(str(tmp_path))
    for loaded in (
        PeftModel.from_pretrained(load_clip(clip_folder), tmp_path),
        PeftModel.from_pretrained(load_clip(clip_folder), tmp_path, low_cpu_mem_usage=True),
        CLIPModel.from_pretrained(tmp_path),
        into,
    ):
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_copies_and_pickles_are_independent(make, clip, inputs):
    model = disturb(get_peft_model(clip, make()))
    before = logits(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, inputs), before)
        disturb(other)
        assert not torch.equal(logits(other, inputs), before)
        assert torch.equal(logits(model, inputs), before)
        other.unload()
        assert torch.equal(logits(model, inputs), before)


def test_types_follow_the_base(make, clip, inputs):
    model = disturb(get_peft_model(clip.to(torch.bfloat16), make()))
    half = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    assert logits(model, half).dtype == torch.bfloat16
    found = logits(model.float(), inputs)
    assert found.dtype == torch.float32


def test_a_temperature_is_tuned_even_where_no_forward_asks_for_it(clip):
    injected = inject_adapter_in_model(FullFineTuningConfig(), clip)
    with torch.no_grad():
        injected.tuned.tuned_parameters["default"]["logit_scale"].fill_(1.5)
    assert injected.logit_scale.item() == 1.5
    assert dict(injected.named_parameters())["logit_scale"].item() != 1.5


def test_a_bare_tower(clip, inputs):
    tower = CLIPVisionModel(clip.config.vision_config).eval()
    with torch.no_grad():
        before = tower(inputs["pixel_values"]).pooler_output
        model = get_peft_model(tower, FullFineTuningConfig()).eval()
        assert torch.equal(model(pixel_values=inputs["pixel_values"]).pooler_output, before)
        disturb(model)
        assert not torch.equal(model(pixel_values=inputs["pixel_values"]).pooler_output, before)


def test_what_cannot_be_tuned_stops_with_a_sentence(clip):
    with pytest.raises(ValueError, match="parameters='weight' matches none of the base's parameters"):
        get_peft_model(clip, FullFineTuningConfig(parameters="weight"))
    assert not hasattr(clip, "tuned")
    clip.visual_projection.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'visual_projection.weight' is quantised, .* give a base in float"):
        get_peft_model(clip, FullFineTuningConfig())
    model = get_peft_model(clip, BitFitConfig())  # whose biases are float
    with pytest.raises(NotImplementedError, match=r"write model.merge_and_unload\(\)"):
        model.merge_adapter()

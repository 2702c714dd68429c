import copy

import pytest
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from transformers import BertConfig, BertModel, CLIPModel

from mmap_peft import MmAPConfig, use_routes


CONFIG = {"num_prompts": 4, "source_shape": (2, 4), "init_std": 0.5}


@pytest.fixture
def model(clip):
    return get_peft_model(clip, MmAPConfig(**CONFIG)).eval()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def logits(model, inputs):
    return model.eval()(**inputs).logits_per_image


def loaded_by_peft(folder, clip_folder):
    return PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), folder)


def loaded_natively(folder, clip_folder):
    return CLIPModel.from_pretrained(folder)


def loaded_into_a_clip(folder, clip_folder):
    clip = CLIPModel.from_pretrained(clip_folder)
    clip.load_adapter(folder)
    return clip


def loaded_automatically(folder, clip_folder):
    return AutoPeftModel.from_pretrained(folder)


@pytest.mark.parametrize("load", [loaded_by_peft, loaded_natively, loaded_into_a_clip, loaded_automatically])
def test_loading_gives_equal_logits(load, model, saved, clip_folder, inputs):
    assert torch.equal(logits(load(saved, clip_folder), inputs), logits(model, inputs))


def test_an_adapter_file_holds_three_tensors(saved):
    with safe_open(f"{saved}/adapter_model.safetensors", "pt") as file:
        names = sorted(name.rpartition(".")[2] for name in file.keys())  # noqa: SIM118, no dict
    assert names == ["scale_text", "scale_vision", "source"]


def test_a_config_survives_its_file(tmp_path):
    config = MmAPConfig(num_prompts=6, source_shape=(3, 2), depth=2, init_std=0.1)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)) == config


def test_disabling_gives_the_base_to_the_bit(model, clip_folder, inputs):
    base = CLIPModel.from_pretrained(clip_folder)
    prompted = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(base, inputs))
    assert torch.equal(logits(model, inputs), prompted)


def test_unloading_gives_the_base_to_the_bit_and_it_can_be_wrapped_again(model, clip_folder, inputs):
    model(**inputs, output_hidden_states=True)
    base, untouched = model.unload(), CLIPModel.from_pretrained(clip_folder)
    assert torch.equal(logits(base, inputs), logits(untouched, inputs))
    assert base.state_dict().keys() == untouched.state_dict().keys()
    assert not any("forward" in vars(module) for module in base.modules())
    assert not any(module._forward_pre_hooks for module in base.modules())
    assert type(base.text_model.encoder.layers[0].self_attn.config) is type(base.config.text_config)
    again = get_peft_model(base, MmAPConfig(**CONFIG))
    assert not torch.equal(logits(again, inputs), logits(untouched, inputs))


def test_a_copy_is_independent(model, inputs):
    before = logits(model, inputs)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, inputs), before)
    with torch.no_grad():
        other.get_base_model().mmap.mmap_generators["default"].source.add_(1)
    assert torch.equal(logits(model, inputs), before)
    assert not torch.equal(logits(other, inputs), before)


def test_adding_an_adapter_leaves_the_flags_of_others(model):
    model.add_adapter("second", MmAPConfig(**CONFIG))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3
    assert all(".default." in name for name in trained)


def test_injecting_into_a_model_without_wrapping_it(clip, inputs):
    base = logits(clip, inputs)
    injected = inject_adapter_in_model(MmAPConfig(**CONFIG), clip, "one")
    assert injected is clip
    assert not torch.equal(logits(clip, inputs), base)
    with use_routes(clip, ()):
        assert torch.equal(logits(clip, inputs), base)


def test_merging_stops_with_a_sentence(model):
    with pytest.raises(NotImplementedError, match="cannot be merged into the base; keep the adapter"):
        model.merge_and_unload()
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()


@pytest.mark.parametrize("name", ["model", "base_model", "mmap", "x.y", "x/y", ".."])
@pytest.mark.filterwarnings("ignore:Adapter name 'mmap' should not be contained")  # PEFT's, before ours
def test_names_that_cannot_be_adapters_stop_with_a_sentence(name, clip, model):
    with pytest.raises(ValueError, match="cannot name an adapter"):
        get_peft_model(copy.deepcopy(model.unload()), MmAPConfig(**CONFIG), adapter_name=name)


def test_a_rejected_adapter_leaves_the_model_as_it_was(model, inputs):
    before = logits(model, inputs)
    with pytest.raises(ValueError, match="more than the 3 layers"):
        model.add_adapter("deep", MmAPConfig(**CONFIG, depth=9))
    with pytest.raises(ValueError, match="cannot name an adapter"):
        model.add_adapter("x.y", MmAPConfig(**CONFIG))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, inputs), before)


def test_a_model_without_towers_stops_with_a_sentence():
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(ValueError, match="BertModel has no CLIP-like text or vision tower"):
        get_peft_model(BertModel(BertConfig(**tiny, vocab_size=10)), MmAPConfig())


def test_settings_that_do_not_fit_leave_the_base_untouched(clip, clip_folder, inputs):
    with pytest.raises(ValueError, match="n=5, which does not divide"):
        get_peft_model(clip, MmAPConfig(num_prompts=4, source_shape=(2, 5)))
    assert torch.equal(logits(clip, inputs), logits(CLIPModel.from_pretrained(clip_folder), inputs))
    assert not hasattr(clip, "mmap")

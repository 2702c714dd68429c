"""Names, models and settings that cannot be: a sentence, and nothing has changed."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

from mmap_peft import IVLPConfig, MaPLeConfig, MmAPConfig

from ..conftest import load_clip


CONFIG = {"num_prompts": 4, "source_shape": (2, 4), "init_std": 0.5}


@pytest.fixture
def model(clip):
    return get_peft_model(clip, MmAPConfig(**CONFIG)).eval()


def logits(model, inputs):
    return model.eval()(**inputs).logits_per_image


@pytest.mark.parametrize("name", ["model", "base_model", "mmap", "x.y", "x/y", "..", "train", "values"])
@pytest.mark.filterwarnings("ignore:Adapter name 'mmap' should not be contained")  # PEFT's, before ours
def test_names_that_cannot_be_adapters(name, model):
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


def test_methods_of_both_towers_need_layers_of_both(clip, inputs):
    before = clip(**inputs).logits_per_image
    for fields in (
        {"target_modules": r"text_model\.encoder\.layers\.\d"},
        {"exclude_modules": r"vision_model\.encoder\.layers\.\d"},
        {"target_modules": r".*encoder\.layers\.(1|2)", "exclude_modules": r"vision_model\.encoder\.layers\.1"},
    ):
        with pytest.raises(ValueError, match="in 1 of 2 towers, but MaPLeConfig puts prompts into"):
            get_peft_model(clip, MaPLeConfig(**fields))
        assert not hasattr(clip, "mmap") and torch.equal(clip(**inputs).logits_per_image, before)


def test_each_tower_has_its_depth(clip):
    config = IVLPConfig(depth=1, vision_depth=2, target_modules=r"vision_model\.encoder\.layers\.1")
    get_peft_model(clip, config)
    assert clip.mmap.layers["default"] == {("vision", 1)}


def test_other_models(inputs):
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(
        ValueError,
        match=r"BertModel has no text or vision tower .* give a model of CLIP, SigLIP, ",
    ):
        get_peft_model(BertModel(BertConfig(**tiny, vocab_size=10)), MmAPConfig())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"source_shape": (2, 5)}, "n=5, which does not divide"),
        ({"target_modules": ["q_proj"]}, r"target_modules=.* matches .*q_proj', which is no encoder layer"),
        ({"target_modules": "nothing"}, "target_modules='nothing' matches no module of the CLIPModel"),
    ],
)
def test_settings_that_do_not_fit_leave_the_base_untouched(fields, sentence, clip, clip_folder, inputs):
    with pytest.raises(ValueError, match=sentence):
        get_peft_model(clip, MmAPConfig(**{**CONFIG, **fields}))
    assert torch.equal(logits(clip, inputs), logits(load_clip(clip_folder), inputs))
    assert not hasattr(clip, "mmap")

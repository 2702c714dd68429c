"""A new method is one file; what PEFT and transformers do with a method's type."""

import copy
import json
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import CLIPModel

import mmap_peft
from mmap_peft import (
    BitFitConfig,
    Method,
    MmAPConfig,
    MultiTaskClassifier,
    MultiTaskTrainer,
    register_method,
    starting_learning_rate,
)
from mmap_peft.data.pictograms import draw

from .conftest import load_clip


PEFT_MAPPINGS = PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
CONFIGS = [
    getattr(mmap_peft, name)()
    for name in mmap_peft.__all__
    if name.endswith("Config") and isinstance(getattr(mmap_peft, name), type)
]


@pytest.fixture(params=["prompts", "no prompts"])
def config(request):
    """Settings of a method that stands in one file of this folder, and nowhere else."""
    before = [dict(mapping) for mapping in PEFT_MAPPINGS]
    from .new_methods.last_norms import LastNormConfig
    from .new_methods.shared_prompts import SharedPromptConfig

    config_class = SharedPromptConfig if request.param == "prompts" else LastNormConfig
    yield register_method(config_class)()
    for mapping, entries in zip(PEFT_MAPPINGS, before):
        mapping.clear()
        mapping.update(entries)


def test_a_method_in_one_file_trains_and_is_saved_and_loaded(
    config, clip, processor, tasks, arguments, clip_folder, tmp_path
):
    classifier = MultiTaskClassifier(clip, processor, tasks, config)
    image = draw("print", "sun", 0)
    before = classifier.predict(image, "photo").probabilities
    MultiTaskTrainer(model=classifier, args=arguments(learning_rate=starting_learning_rate(config))).train()
    after = classifier.predict(image, "photo").probabilities
    assert not torch.allclose(after, before, atol=1e-4)
    classifier.save_pretrained(tmp_path)
    again = MultiTaskClassifier.from_pretrained(tmp_path)
    assert type(again.adapter_config) is type(config)
    torch.testing.assert_close(again.predict(image, "photo").probabilities, after, atol=1e-6, rtol=1e-5)
    assert "A. Author" in (tmp_path / "README.md").read_text()
    folder = tmp_path / classifier.adapters[0]
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == config.method.peft_type.value
    model = PeftModel.from_pretrained(load_clip(clip_folder), folder)
    native = CLIPModel.from_pretrained(folder).eval().get_image_features(torch.zeros(1, 3, 48, 48)).pooler_output
    expected = model.eval().get_base_model().get_image_features(torch.zeros(1, 3, 48, 48)).pooler_output
    torch.testing.assert_close(native, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_type_is_the_plain_string_with_what_peft_asks_of_its_own(config, tmp_path):
    peft_type = config.peft_type
    assert isinstance(peft_type, str) and peft_type == peft_type.value == peft_type.name
    assert type(peft_type.value) is str and hash(peft_type) == hash(peft_type.value)
    assert str(peft_type).partition(".")[-1] == peft_type.value
    for copied in (copy.copy(peft_type), copy.deepcopy(peft_type), pickle.loads(pickle.dumps(peft_type))):
        assert copied == peft_type and type(copied) is type(peft_type)
    assert json.loads(json.dumps(peft_type)) == peft_type.value
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded.peft_type == peft_type and loaded.to_dict() == config.to_dict() and type(loaded) is type(config)


def test_every_config_of_the_package_is_registered_with_its_data():
    assert len(CONFIGS) == 13
    for config in CONFIGS:
        method = type(config).method
        assert PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type.value] is type(config)
        assert PEFT_TYPE_TO_PREFIX_MAPPING[method.peft_type] == PEFT_TYPE_TO_TUNER_MAPPING[method.peft_type].prefix
        assert method.name and method.source and 0 < method.learning_rate < 1
        assert starting_learning_rate(config) == method.learning_rate
    assert not {config.peft_type for config in CONFIGS} & set(PeftType)


def test_the_status_of_a_model_names_the_method(clip):
    assert get_peft_model(clip, BitFitConfig()).get_model_status().peft_types == {"default": "BITFIT"}


def test_a_config_that_cannot_be_registered_stops_with_a_sentence():
    @dataclass
    class Nameless(PeftConfig):
        pass

    @dataclass
    class Second(MmAPConfig):
        pass

    @dataclass
    class Taken(MmAPConfig):
        method: ClassVar[Method] = Method("LORA", "Mine", 1e-3, "")

    before = [dict(mapping) for mapping in PEFT_MAPPINGS]
    for config_class, sentence in (
        (Nameless, "Nameless does not say which method it is for; give it"),
        (Second, "peft_type='MMAP' of Second is that of MmAPConfig"),
        (Taken, "peft_type='LORA' of Taken is that of LoraConfig"),
    ):
        with pytest.raises(ValueError, match=sentence):
            register_method(config_class)
    assert before == [dict(mapping) for mapping in PEFT_MAPPINGS]

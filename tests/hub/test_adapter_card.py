"""The README of an adapter's folder, as PEFT and a classifier save it."""

import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, CLIPModel

from mmap_peft import BitFitConfig, LinearProbeConfig, MmAPConfig, MultiTaskClassifier, lora_config


GAPS, MMAP = "More Information Needed", MmAPConfig(num_prompts=4, source_shape=(2, 4))


@pytest.mark.parametrize("config", [MMAP, BitFitConfig()])
def test_peft_saves_a_card_without_gaps_whose_code_runs(config, clip, clip_folder, tmp_path):
    model = get_peft_model(clip, config)
    for _ in range(2):  # saved again, it is written again
        model.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert GAPS not in card.content
        assert (card.data.library_name, card.data.tags) == ("peft", ["mmap_peft", "clip"])
        assert clip_folder not in card.content
    size = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert f"It has {size:,} parameters." in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    code = code.replace("path/to/the/base", clip_folder).replace("path/or/name", str(tmp_path))
    names = {}
    exec(code, names)
    assert type(names["model"].active_peft_config) is type(config)


def test_several_adapters_have_one_card_that_names_their_folders(clip, tmp_path):
    model = get_peft_model(clip, MMAP, adapter_name="one")
    model.add_adapter("two", MMAP)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert 'subfolder="one"' in text and 'subfolder="two"' in text


def test_a_readme_that_somebody_wrote_stays_and_the_empty_form_does_not(clip, tmp_path):
    model = get_peft_model(clip, MMAP)
    (tmp_path / "README.md").write_text("# Mine\n\nMore Information Needed, says a form.\n")
    model.save_pretrained(tmp_path)
    assert "# Mine\n\nMore Information Needed, says a form." in (tmp_path / "README.md").read_text()
    ModelCard.from_template(ModelCardData(library_name="peft")).save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    assert GAPS not in (tmp_path / "README.md").read_text()


def test_methods_of_peft_keep_the_card_of_peft(clip, tmp_path):
    get_peft_model(clip, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert GAPS in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("config", [MMAP, lora_config(), LinearProbeConfig()])
def test_each_adapter_of_a_classifier_has_a_card(config, clip_folder, processor, tasks, tmp_path):
    classifier = MultiTaskClassifier(CLIPModel.from_pretrained(clip_folder), processor, tasks, config)
    classifier.save_pretrained(tmp_path)
    for adapter in classifier.adapters:
        card = ModelCard.load(tmp_path / adapter / "README.md")
        assert "one of the adapters of a classifier of 3 tasks" in card.text
        assert f"subfolder={adapter!r}".replace("'", '"') in card.text or isinstance(config, LinearProbeConfig)
        assert GAPS not in card.content
        assert clip_folder not in card.content


def test_the_config_in_the_root_confuses_neither_transformers_nor_peft(clip, clip_folder, processor, tasks, tmp_path):
    base = CLIPModel.from_pretrained(clip_folder)
    MultiTaskClassifier(base, processor, tasks, MMAP).save_pretrained(tmp_path)
    for load in (
        lambda: PeftModel.from_pretrained(clip, str(tmp_path), subfolder="global"),
        lambda: AutoPeftModel.from_pretrained(tmp_path / "global"),
        lambda: CLIPModel.from_pretrained(tmp_path / "global"),
    ):
        assert any("mmap_generators" in name for name, _ in load().named_parameters())
    for load in (AutoConfig.from_pretrained, CLIPModel.from_pretrained, AutoPeftModel.from_pretrained):
        with pytest.raises((ValueError, OSError)):  # the root is no model of transformers and no adapter
            load(tmp_path)
    (tmp_path / "config.json").unlink()  # as in folders of before
    MultiTaskClassifier.from_pretrained(tmp_path)

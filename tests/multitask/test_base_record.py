"""The base and the processor of a training come back, or what is different is named."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from tokenizers.normalizers import Replace
from transformers import CLIPModel

from mmap_peft import LinearProbeConfig, MmAPConfig, MultiTaskClassifier, load_processor, lora_config
from mmap_peft.data.pictograms import draw, small_clip
from tests.conftest import tiny_clip


IMAGES = [draw("print", "sun", number).resize((90, 60)) for number in range(2)]
CONFIGS = [MmAPConfig(num_prompts=4, source_shape=(2, 4)), lora_config(r=2), LinearProbeConfig()]


@pytest.fixture
def bases(tmp_path):
    """A folder with two CLIPs of different weights in subfolders."""
    for seed in range(2):
        tiny_clip(seed=seed).save_pretrained(tmp_path / "bases" / f"seed_{seed}")
        load_processor(small_clip()).save_pretrained(tmp_path / "bases" / f"seed_{seed}")
    return tmp_path / "bases"


def saved(clip, processor, tasks, folder, config=CONFIGS[0]):
    """A classifier's probabilities, once it is saved."""
    classifier = MultiTaskClassifier(clip, processor, tasks, config).eval()
    classifier.save_pretrained(folder)
    return probabilities(classifier)


def probabilities(classifier):
    return torch.cat([classifier.predict(IMAGES, task).probabilities for task in classifier.tasks], dim=1)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("seed", range(2))
def test_a_base_in_a_subfolder_comes_back(seed, config, bases, tasks, tmp_path):
    clip = CLIPModel.from_pretrained(bases, subfolder=f"seed_{seed}")
    expected = saved(clip, load_processor(small_clip()), tasks, tmp_path, config)
    assert torch.equal(probabilities(MultiTaskClassifier.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "bfloat16"), ("float32", "float64")])
def test_a_base_in_another_dtype_than_its_file_comes_back(dtypes, tasks, tmp_path):
    in_file, loaded = (getattr(torch, name) for name in dtypes)
    tiny_clip().to(in_file).save_pretrained(tmp_path / "clip")
    load_processor(small_clip()).save_pretrained(tmp_path / "clip")
    clip = CLIPModel.from_pretrained(tmp_path / "clip", dtype=loaded)
    expected = saved(clip, load_processor(small_clip()), tasks, tmp_path / "out")
    again = MultiTaskClassifier.from_pretrained(tmp_path / "out")
    assert again.clip.dtype == loaded
    assert torch.equal(probabilities(again), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"do_center_crop": False, "size": {"height": 48, "width": 48}},
        {"resample": 0},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.3, 0.4]},
    ],
    ids=str,
)
def test_a_processor_of_the_users_own_comes_back(changes, clip, tasks, tmp_path):
    processor = load_processor(small_clip())
    own = processor.image_processor
    processor.image_processor = type(own).from_dict({**own.to_dict(), **changes})
    expected = saved(clip, processor, tasks, tmp_path)
    assert torch.equal(probabilities(MultiTaskClassifier.from_pretrained(tmp_path)), expected)


def test_an_image_processor_without_settings_is_asked_for(clip, tasks, tmp_path):
    class Own:
        def __call__(self, images, return_tensors):
            return processor.image_processor(images=images, return_tensors=return_tensors)

    processor = load_processor(small_clip())
    own = copy.copy(processor)
    object.__setattr__(own, "image_processor", Own())
    expected = saved(clip, own, tasks, tmp_path)
    with pytest.raises(ValueError, match="image processor of the class Own, whose settings"):
        MultiTaskClassifier.from_pretrained(tmp_path)
    assert torch.equal(probabilities(MultiTaskClassifier.from_pretrained(tmp_path, processor=own)), expected)


def test_another_base_at_the_same_place_is_named(tasks, processor, tmp_path, caplog):
    tiny_clip().save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    saved(CLIPModel.from_pretrained(tmp_path / "clip"), processor, tasks, tmp_path / "out")
    tiny_clip(seed=1).save_pretrained(tmp_path / "clip")
    with pytest.raises(
        ValueError, match=r"weights of the base .*clip are not those .* model=\.\.\.\), or write verify"
    ):
        MultiTaskClassifier.from_pretrained(tmp_path / "out")
    for given in ({"verify": False}, {"model": tiny_clip(seed=1)}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            MultiTaskClassifier.from_pretrained(tmp_path / "out", **{"processor": processor, **given})
        assert "are not those that the adapters were trained on" in caplog.text
    caplog.clear()
    MultiTaskClassifier.from_pretrained(tmp_path / "out", model=tiny_clip(), processor=processor)
    assert not caplog.text


def test_another_tokenizer_is_named(tasks, processor, tmp_path):
    tiny_clip().save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    other = load_processor(tmp_path / "clip")
    other.tokenizer.backend_tokenizer.normalizer = Replace("photo", "star")
    saved(CLIPModel.from_pretrained(tmp_path / "clip"), other, tasks, tmp_path / "out")
    with pytest.raises(ValueError, match="tokenizer makes other tokens"):
        MultiTaskClassifier.from_pretrained(tmp_path / "out")


def test_a_base_that_was_changed_between_two_saves_is_described_anew(clip, processor, tasks, tmp_path):
    classifier = MultiTaskClassifier(clip, processor, tasks, CONFIGS[0]).eval()
    classifier.save_pretrained(tmp_path)
    classifier.half()
    classifier.save_pretrained(tmp_path)
    again = MultiTaskClassifier.from_pretrained(tmp_path)
    assert again.clip.dtype == torch.float16
    assert torch.equal(probabilities(again), probabilities(classifier))

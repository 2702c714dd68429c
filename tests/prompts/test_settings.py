"""Settings of prompt methods that cannot be, or that do not fit a model's towers."""

import pytest

from mmap_peft import CoOpConfig, IVLPConfig, MaPLeConfig, MmAPConfig, MMRLTokensConfig, PromptSRCConfig, VPTConfig
from mmap_peft.prompts.base import TowerShape


NUMBERS = [
    (config_class, name)
    for config_class in (CoOpConfig, IVLPConfig, PromptSRCConfig, MMRLTokensConfig, MaPLeConfig, VPTConfig)
    for name in ("num_prompts", "depth", "num_vision_prompts", "vision_depth", "num_classes", "token_size")
    if hasattr(config_class, name)
]
TEXT, VISION = {"text": TowerShape(3, 32)}, {"vision": TowerShape(2, 48)}


@pytest.mark.parametrize(("config_class", "name"), NUMBERS)
@pytest.mark.parametrize("value", [0, -1])
def test_a_number_below_one_stops_with_a_sentence(config_class, name, value):
    with pytest.raises(ValueError, match=f"Invalid value {value} for `{name}`: expected an integer from 1 to"):
        config_class(**{name: value})


@pytest.mark.parametrize(
    ("config", "towers", "sentence"),
    [
        (CoOpConfig(), VISION, "CoOpConfig puts prompts into the text tower, but the model has only vision"),
        (VPTConfig(), TEXT, "VPTConfig puts prompts into the vision tower, but the model has only text"),
        (MaPLeConfig(), TEXT, "MaPLeConfig puts prompts into the text and vision tower, but the model has only text"),
        (VPTConfig(depth=3), TEXT | VISION, "depth=3 is more than the 2 layers"),
        (MaPLeConfig(depth=3), TEXT | VISION, "depth=3 is more than the 2 layers"),
        (IVLPConfig(depth=4), TEXT | VISION, "depth=4 is more than the 3 layers"),
        (
            PromptSRCConfig(),
            TEXT | VISION,
            "depth=9 is more than the 3 layers of a tower; expected at most 3, or None",
        ),
        (MMRLTokensConfig(first_layer=2), TEXT | VISION, "first_layer=2 is none of the first 2 layers of the vision"),
        (MmAPConfig(first_layer=3), TEXT, "first_layer=3 is none of the first 3 layers of the text tower.* at most 2"),
        (
            VPTConfig(first_layer=1, depth=1),
            TEXT | VISION,
            "first_layer=1 is none of the first 1 layers of the vision",
        ),
        (IVLPConfig(first_layer=1, vision_depth=1), TEXT | VISION, "none of the first 1 layers of the vision tower"),
        (MaPLeConfig(first_layer=2), TEXT | VISION, "first_layer=2 is none of the first 2 layers of the vision tower"),
        (IVLPConfig(vision_depth=3), TEXT | VISION, "vision_depth=3 is more than the 2 layers"),
    ],
)
def test_settings_that_do_not_fit_the_towers_stop_with_a_sentence(config, towers, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.check(towers)


@pytest.mark.parametrize("config", [IVLPConfig(), IVLPConfig(vision_depth=3), IVLPConfig(depth=3)])
def test_one_of_two_towers_is_enough_for_independent_prompts(config):
    config.check(TEXT)


def test_each_tower_of_ivlp_has_its_own_number_and_depth():
    config = IVLPConfig(num_prompts=2, depth=3, num_vision_prompts=5, vision_depth=1, init_std=0.1)
    generator = config.generator_class(config, TEXT | VISION)
    assert generator("text").shape == (3, 2, 32) and generator("vision").shape == (1, 5, 48)
    config = IVLPConfig(num_prompts=2)
    generator = config.generator_class(config, TEXT | VISION)
    assert generator("text").shape == (3, 2, 32) and generator("vision").shape == (2, 2, 48)

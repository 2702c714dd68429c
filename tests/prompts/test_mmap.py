import pytest
import torch

from mmap_peft.prompts.base import TowerShape
from mmap_peft.prompts.mmap import MmAPConfig, MmAPGenerator


TOWERS = {"text": TowerShape(3, 32), "vision": TowerShape(2, 48)}


def test_prompts_are_kronecker_products_of_scale_and_source():
    generator = MmAPGenerator(MmAPConfig(num_prompts=6, source_shape=(3, 8)), TOWERS)
    for tower, shape in TOWERS.items():
        prompts = generator(tower)
        assert prompts.shape == (shape.layers, 6, shape.width)
        scale = getattr(generator, f"scale_{tower}")
        for layer in range(shape.layers):
            for row in range(6):
                for column in range(0, shape.width, 5):
                    factor = scale[layer, row // 3, column // 8]
                    assert prompts[layer, row, column] == factor * generator.source[row % 3, column % 8]


def test_three_tensors_with_the_number_of_parameters_of_the_formula():
    generator = MmAPGenerator(MmAPConfig(num_prompts=16, source_shape=(2, 8)), TOWERS)
    assert sorted(dict(generator.named_parameters())) == ["scale_text", "scale_vision", "source"]
    m, n, b = 2, 8, 16
    expected = m * n + b * (3 * 32 + 2 * 48) // (m * n)
    assert sum(parameter.numel() for parameter in generator.parameters()) == expected


def test_one_source_feeds_every_layer_of_both_towers():
    generator = MmAPGenerator(MmAPConfig(num_prompts=4, source_shape=(2, 4)), TOWERS)
    for tower, shape in TOWERS.items():
        for layer in range(shape.layers):
            (grad,) = torch.autograd.grad(generator(tower)[layer].sum(), generator.source)
            assert grad.abs().min() > 0


def test_depth_leaves_later_layers_without_prompts():
    generator = MmAPGenerator(MmAPConfig(num_prompts=4, source_shape=(2, 4), depth=2), TOWERS)
    assert generator("text").shape == (2, 4, 32)
    assert generator.scale_text.shape[0] == 2


def test_initial_spread_of_the_prompts():
    config = MmAPConfig(num_prompts=64, source_shape=(8, 8), init_std=0.05)
    generator = MmAPGenerator(config, {"vision": TowerShape(12, 512)})
    stds = [MmAPGenerator(config, {"vision": TowerShape(12, 512)})("vision").std() for _ in range(20)]
    assert generator("vision").mean().abs() < 0.01
    assert torch.stack(stds).mean().item() == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_prompts": 5, "source_shape": (2, 8)}, "m=2, which does not divide num_prompts=5"),
        ({"num_prompts": 0}, "Invalid value 0 for `num_prompts`: expected an integer from 1 to 1024"),
        ({"depth": 0}, "Invalid value 0 for `depth`: expected an integer from 1 to 1000, or None"),
        ({"source_shape": (2,)}, r"for `source_shape`: expected two integers of 1 or more, \(m, n\)"),
        ({"source_shape": (0, 8)}, r"for `source_shape\[0\]`: expected a number greater than or equal to 1"),
        ({"init_std": 0.0}, "Invalid value 0.0 for `init_std`: expected a finite number above 0"),
    ],
)
def test_wrong_settings_stop_with_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        MmAPConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"source_shape": (2, 5)}, "n=5, which does not divide the text tower's width 32"),
        ({"source_shape": (2, 32)}, "does not divide the vision tower's width 48"),
        ({"depth": 4}, "more than the 3 layers"),
    ],
)
def test_settings_that_do_not_fit_the_towers_stop_with_a_sentence(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        MmAPConfig(**fields).check(TOWERS)


def test_share_on_vit_b16_with_four_tasks_is_at_most_a_thousandth():
    towers = {"text": TowerShape(12, 512), "vision": TowerShape(12, 768)}
    adapter = sum(parameter.numel() for parameter in MmAPGenerator(MmAPConfig(), towers).parameters())
    with torch.device("meta"):
        from transformers import CLIPConfig, CLIPModel

        text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config={"patch_size": 16}, projection_dim=512))
    base = sum(parameter.numel() for parameter in clip.parameters())
    assert base == 149_620_737  # openai/clip-vit-base-patch16
    at_most = 8 * adapter  # four groups of one task each, and four tasks
    assert at_most / base <= 0.001

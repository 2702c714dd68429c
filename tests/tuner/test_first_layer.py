"""Prompts from some layer on: `first_layer`."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import CLIPModel

from mmap_peft import CoOpConfig, IVLPConfig, MaPLeConfig, MmAPConfig, PromptSRCConfig, VPTConfig, use_routes


# Method, settings, and the parameters with a row for each layer.
METHODS = {
    "mmap": (MmAPConfig, {"init_std": 0.5}, ["scale_text", "scale_vision"]),
    "vpt": (VPTConfig, {"init_std": 0.5}, ["vision_prompts"]),
    "ivlp": (IVLPConfig, {"init_std": 0.5, "num_vision_prompts": 3}, ["text_prompts", "vision_prompts"]),
    "promptsrc": (PromptSRCConfig, {"init_std": 0.5, "depth": 2}, ["text_prompts", "vision_prompts"]),
    "maple": (MaPLeConfig, {"init_std": 0.5}, ["text_prompts", "proj_weight", "proj_bias"]),
}


def with_prompts(clip_folder, config):
    torch.manual_seed(0)
    model = get_peft_model(CLIPModel.from_pretrained(clip_folder).eval(), config)
    return model, model.get_base_model().mmap.mmap_generators["default"]


@pytest.mark.parametrize("name", METHODS)
def test_equals_prompts_of_chosen_modules_without_the_unused_rows(name, clip_folder, inputs):
    config_class, settings, by_layer = METHODS[name]
    whole, all_rows = with_prompts(clip_folder, config_class(**settings, target_modules=r".*layers\.[1-9]"))
    late, generator = with_prompts(clip_folder, config_class(**settings, first_layer=1))
    rows = dict(all_rows.named_parameters())
    with torch.no_grad():
        for parameter, values in generator.named_parameters():
            values.copy_(rows[parameter][1:] if parameter in by_layer else rows[parameter])
    outputs = [model(**inputs, output_hidden_states=True) for model in (whole, late)]
    gradients = [
        torch.autograd.grad(output.logits_per_image.square().sum(), list(part.parameters()))
        for output, part in zip(outputs, (all_rows, generator))
    ]
    for (parameter, _), expected, found in zip(generator.named_parameters(), *gradients):
        assert torch.equal(expected[1:] if parameter in by_layer else expected, found) and found.any()
    assert torch.equal(outputs[0].logits_per_image, outputs[1].logits_per_image)
    plain = CLIPModel.from_pretrained(clip_folder).eval()(**inputs, output_hidden_states=True)
    before, after = (
        [torch.equal(a, b) for a, b in zip(plain.vision_model_output.hidden_states, hidden)]
        for hidden in (outputs[1].vision_model_output.hidden_states[:2], outputs[1].vision_model_output.hidden_states)
    )
    assert all(before) and not all(after)


@pytest.mark.parametrize("name", METHODS)
def test_save_and_load(name, clip_folder, inputs, tmp_path):
    config_class, settings, _ = METHODS[name]
    model, _ = with_prompts(clip_folder, config_class(**settings, first_layer=1))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder).eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits_per_image, loaded(**inputs).logits_per_image)


def test_adapters_with_different_first_layers_in_one_batch(clip_folder, inputs):
    """MmAP's prompts are dropped after each layer, so each row has those of its own layers."""
    model, _ = with_prompts(clip_folder, MmAPConfig(init_std=0.5))
    model.add_adapter("late", MmAPConfig(init_std=0.5, first_layer=1))
    pixels = inputs["pixel_values"][:2]
    with torch.no_grad():
        with use_routes(model, [("default",), ("late",)], vision=[0, 1]):
            together = model.get_image_features(pixels).pooler_output
        for row, adapter in enumerate(["default", "late"]):
            with use_routes(model, (adapter,)):
                alone = model.get_image_features(pixels).pooler_output[row]
            torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


def test_coop_has_no_later_layer():
    with pytest.raises(ValueError, match="first_layer=1 is not CoOp, whose prompts are words; write 0"):
        CoOpConfig(first_layer=1)

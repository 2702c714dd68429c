"""Every family that is said to work: prompts in, gradients to all of them, both paths equal, saved and loaded."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from mmap_peft import CoOpConfig, IVLPConfig, MaPLeConfig, MmAPConfig, VPTConfig, use_routes
from mmap_peft.tuner.model import FAMILIES

from .test_forward import assert_gradients_close


CONFIG = {"num_prompts": 4, "source_shape": (2, 4), "init_std": 0.5}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "bos_token_id": 96,
    "eos_token_id": 98,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 16,
}
SIGLIP = {"projection_size": 48}
MODELS = {
    "clip": ("CLIP", {}, {"projection_dim": 16}),
    "siglip": ("Siglip", SIGLIP, {}),  # the fixed-resolution checkpoints of SigLIP 2 are of this class too
    "siglip2": ("Siglip2", SIGLIP, {}),
    "metaclip_2": ("MetaClip2", {}, {"projection_dim": 16}),
    "clipseg": ("CLIPSeg", {}, {"projection_dim": 16}),
}
IDS = torch.tensor([[96, 3, 4, 98], [96, 5, 98, 0], [96, 6, 7, 98]])


def build(family, attention="sdpa", part=None, **fields):
    """A random model of a family, or one of its bare towers (`"Text"`, `"Vision"`)."""
    name, text, joint = MODELS[family]
    text = {**text, **fields}
    torch.manual_seed(0)
    if part is None:
        config = getattr(transformers, f"{name}Config")(text_config={**TEXT, **text}, vision_config=VISION, **joint)
    else:
        config = getattr(transformers, f"{name}{part}Config")(**({**TEXT, **text} if part == "Text" else VISION))
    model = getattr(transformers, f"{name}{part or ''}Model")._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(family):
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    vision = {"pixel_values": pixels}
    if family == "siglip2":  # patches of images of any size
        patches = pixels.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(3, 9, -1)
        vision = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(3, 9, dtype=torch.long),
            "spatial_shapes": torch.tensor([[3, 3]] * 3),
        }
    return {"input_ids": IDS, "attention_mask": (IDS != 0).long()}, vision


def run(model, weights, plain):
    model.get_base_model().mmap.as_tokens = plain
    text, vision = inputs(model.get_base_model().config.model_type)
    with use_routes(model, [("x",), ("x", "y"), ()], text=[1, 0, 2], vision=[0, 2, 1]):
        found = model(**text, **vision).logits_per_image
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return found, torch.autograd.grad((found * weights).sum(), parameters)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
def test_both_paths_agree_and_every_parameter_gets_a_gradient(family, attention):
    model = get_peft_model(build(family, attention), MmAPConfig(**CONFIG), adapter_name="x")
    model.add_adapter("y", MmAPConfig(**CONFIG))
    model.base_model.set_requires_grad(["x", "y"], True)
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    (fast, fast_gradients), (plain, plain_gradients) = run(model, weights, False), run(model, weights, True)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in plain_gradients)
    assert_gradients_close(fast_gradients, plain_gradients)
    text, vision = inputs(family)
    base = build(family, attention)(**text, **vision).logits_per_image
    assert (fast - base).abs().max() > 1e-2


RIDING = {
    "coop": CoOpConfig(num_prompts=1, init_std=0.5),
    "vpt": VPTConfig(num_prompts=2, init_std=0.5),
    "ivlp": IVLPConfig(num_prompts=1, num_vision_prompts=2, init_std=0.5),
    "maple": MaPLeConfig(num_prompts=1, init_std=0.5),
}


@pytest.mark.parametrize("method", RIDING)
@pytest.mark.parametrize("family", MODELS)
def test_prompts_that_ride_on(family, method, tmp_path):
    text, vision = inputs(family)
    if family == "siglip2" and method != "coop":
        with pytest.raises(ValueError, match="adds tokens to images, but a Siglip2VisionModel masks images"):
            get_peft_model(build(family), copy.deepcopy(RIDING[method]))
        return
    model = get_peft_model(build(family), copy.deepcopy(RIDING[method])).eval()
    output = model(**text, **vision)
    assert output.vision_model_output.last_hidden_state.shape[1] == (9 if family.startswith("siglip") else 10)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for gradient in torch.autograd.grad(output.logits_per_image.pow(2).sum(), list(parameters.values())):
        assert gradient.abs().max() > 0
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family), str(tmp_path)).eval()
    found = again(**text, **vision).logits_per_image
    torch.testing.assert_close(found, output.logits_per_image, atol=1e-5, rtol=1e-5)


ENDS = {"metaclip_2": ([0], 2, 1), "siglip": ([], 1, 1), "siglip of Gemma": ([], 1, 0)}  # start, end, padding


@pytest.mark.parametrize("method", ["coop", "coop middle", "coop front", "ivlp", "maple", "mmap"])
@pytest.mark.parametrize("family", ENDS)
def test_texts_as_the_tokenizers_of_checkpoints_make_them(family, method):
    """MetaCLIP 2 has the end that old configs of CLIP say; SigLIP has no start and an end that its config hides."""
    start, end, padding = ENDS[family]
    clip = build(family.split()[0], bos_token_id=0, eos_token_id=2 if start else 98, pad_token_id=1)
    config = copy.deepcopy(MmAPConfig(**CONFIG) if method == "mmap" else RIDING[method.split()[0]])
    config.num_prompts = 4 if method == "mmap" else 2
    if " " in method:
        config.position = method.split()[1]
    model = get_peft_model(clip, config).eval().get_base_model()

    def features(*texts):
        ids = [[*start, *words, end] for words in texts]
        return model.get_text_features(torch.tensor([row + [padding] * (12 - len(row)) for row in ids])).pooler_output

    texts = [[9, 9, *name, 50] for name in ([20], [21], [20, 22], [20, 23], [24])]
    together = features(*texts)
    torch.testing.assert_close(together, torch.cat([features(text) for text in texts]), atol=1e-5, rtol=1e-5)
    assert torch.pdist(together).min() > 1e-3
    if method != "mmap":
        with pytest.raises(ValueError, match="but 2 prompts take the places of as many"):
            features([20, 30], [21, 30])


@pytest.mark.parametrize("family", MODELS)
def test_saved_and_loaded(family, tmp_path):
    text, vision = inputs(family)
    model = get_peft_model(build(family), MmAPConfig(**CONFIG)).eval()
    expected = model(**text, **vision).logits_per_image
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family), str(tmp_path)).eval()
    assert torch.equal(again(**text, **vision).logits_per_image, expected)
    base = build(family).requires_grad_(False)  # torch's own attention goes another way when something trains
    assert torch.equal(again.unload()(**text, **vision).logits_per_image, base(**text, **vision).logits_per_image)


@pytest.mark.parametrize("part", ["Text", "Vision"])
@pytest.mark.parametrize("family", MODELS)
def test_bare_towers(part, family, tmp_path):
    text, vision = inputs(family)
    given = text if part == "Text" else vision
    model = get_peft_model(build(family, part=part), MmAPConfig(**CONFIG)).eval()
    found = model(**given).pooler_output
    assert not torch.allclose(found, build(family, part=part)(**given).pooler_output)
    names = {name.rpartition(".")[2]: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(names) == {"source", f"scale_{part.lower()}"}
    for gradient in torch.autograd.grad(found.pow(2).sum(), list(names.values())):
        assert gradient.abs().max() > 0
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family, part=part), str(tmp_path)).eval()
    assert torch.equal(again(**given).pooler_output, found)


def test_all_families_are_here():
    assert set(MODELS) == set(FAMILIES)


def test_a_family_with_one_tower_that_is_like_clip_is_refused():
    config = transformers.ChineseCLIPConfig(text_config=TEXT, vision_config=VISION)
    with pytest.raises(ValueError, match="ChineseCLIPModel has no text or vision tower"):
        get_peft_model(transformers.ChineseCLIPModel(config), MmAPConfig(**CONFIG))

"""CoOp, VPT, IVLP and MaPLe compute what their authors' code computed; `tests/golden/README.md` says how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from mmap_peft import CoOpConfig, IVLPConfig, MaPLeConfig, VPTConfig


GOLDEN = Path(__file__).parents[1] / "golden"
INPUTS = load_file(GOLDEN / "inputs.safetensors")
CASES = {
    "coop_end": (CoOpConfig(num_prompts=4), "x4"),
    "coop_photo4": (CoOpConfig(num_prompts=4), "photo"),
    "vpt_shallow": (VPTConfig(num_prompts=4, depth=1), "photo"),
    "vpt_deep": (VPTConfig(num_prompts=4, depth=3), "photo"),
    "ivlp_full": (IVLPConfig(num_prompts=2, depth=3, num_vision_prompts=2, vision_depth=3), "photo"),
    "maple_d3_n2": (MaPLeConfig(num_prompts=2, depth=3), "photo"),
}


def read(case):
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict


def clip():
    model = CLIPModel(CLIPConfig(**json.loads((GOLDEN / "config.json").read_text())))
    model.load_state_dict(load_file(GOLDEN / "clip_hf.safetensors"))
    return model.eval()


def run(model, texts):
    output = model(input_ids=INPUTS[f"input_ids_{texts}"], pixel_values=INPUTS["images"])
    return output, F.cross_entropy(output.logits_per_image, INPUTS["labels"])


def test_zero_shot():
    expected = read("zeroshot")
    torch.testing.assert_close(run(clip(), "photo")[0].logits_per_image, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    config, texts = CASES[case]
    expected, model = read(case), get_peft_model(clip(), config).eval()
    parameters = dict(model.get_base_model().mmap.mmap_generators["default"].named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == expected[name].shape
            parameter.copy_(expected[name])
    output, loss = run(model, texts)
    loss.backward()
    for tower in ("text", "image"):
        features = F.normalize(expected[f"{tower}_features"], dim=-1)
        torch.testing.assert_close(output[f"{tower}_embeds"], features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits_per_image, expected["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected["loss"], atol=1e-5, rtol=1e-5)
    gradients = {name.removeprefix("grad_"): tensor for name, tensor in expected.items() if name.startswith("grad_")}
    assert gradients.keys() >= parameters.keys()
    for name, parameter in parameters.items():
        assert (parameter.grad - gradients[name]).norm() <= 1e-4 * gradients[name].norm(), name

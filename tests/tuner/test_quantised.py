"""Prompts on a base of 8 or 4 bits."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, CLIPModel

from mmap_peft import MmAPConfig
from mmap_peft.data.pictograms import draw, small_clip

from ..conftest import tiny_clip


EIGHT, FOUR = BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True)
pytestmark = pytest.mark.usefixtures("unpacked")
BITS = pytest.mark.parametrize("quantization", [EIGHT, FOUR], ids=["8 bits", "4 bits"])


@pytest.fixture(scope="module")
def inputs(processor):
    images = [draw("print", name, 0) for name in ("sun", "cloud", "star")]
    texts = ["a photo of a sun.", "cloud", "a photo of a star."]
    return processor(text=texts, images=images, return_tensors="pt", padding=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Makes a CLIP for a quantisation, of that many bits or in float.

    On a CPU, bitsandbytes 0.50 reads weights of 4 bits rightly only if input widths are multiples of 64, which those
    of the small CLIP are not.
    """
    wide = tmp_path_factory.mktemp("wide")
    tiny_clip(text_width=64, vision_width=128, intermediate=256).save_pretrained(wide)

    def load(quantization, quantised=True):
        folder = wide if quantization is FOUR else small_clip()
        return CLIPModel.from_pretrained(folder, quantization_config=quantization if quantised else None).eval()

    return load


def prompted(clip):
    torch.manual_seed(0)
    return get_peft_model(clip, MmAPConfig(init_std=0.3)).eval()


def gradients(model, inputs):
    # Of the logits themselves: a softmax that is almost sure would scale gradients by how sure it is.
    logits = model(**inputs).logits_per_image
    (logits.diagonal().mean() - logits.mean()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("quantization", "cosine", "error"), [(EIGHT, 0.99, 0.1), (FOUR, 0.8, 1e-4)], ids=["8 bits", "4 bits"]
)
def test_gradients_are_those_of_the_same_weights_in_float(quantization, cosine, error, base, inputs):
    """4 bits are computed in float32, so they are equal; 8 bits round activations too, so they are near."""
    model = prompted(base(quantization))
    assert not model.get_base_model().vision_model.encoder.layers[0].mlp.fc1.weight.is_floating_point()
    found = gradients(model, inputs)
    exact = gradients(prompted(base(quantization).dequantize()), inputs)
    plain = gradients(prompted(base(quantization, quantised=False)), inputs)
    assert list(found) == list(exact) == list(plain) and len(found) == 3
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < error * exact[name].norm()
        assert torch.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0) > cosine


@BITS
def test_trained_prompts_are_saved_and_loaded(quantization, base, inputs, tmp_path):
    model = prompted(base(quantization))
    weights = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(**inputs, return_loss=True).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(parameter, weights.get(name, parameter)) for name, parameter in model.named_parameters())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        loaded = PeftModel.from_pretrained(base(quantization), tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits_per_image, expected)
        native = CLIPModel.from_pretrained(tmp_path, quantization_config=quantization).eval()
        assert torch.equal(native(**inputs).logits_per_image, expected)
        plain = base(quantization)(**inputs).logits_per_image
        assert torch.equal(model.unload()(**inputs).logits_per_image, plain)
        assert not torch.equal(expected, plain)

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, Siglip2ImageProcessorPil, SiglipImageProcessorPil

from mmap_peft.multitask.preprocessing import Preprocessing


def image(*size, seed=1):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.mark.parametrize(
    "make",
    [
        CLIPImageProcessorPil,
        SiglipImageProcessorPil,
        lambda: CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 31, "width": 30}),
        lambda: CLIPImageProcessorPil(do_normalize=False),
    ],
    ids=["clip", "siglip", "crop larger than image", "no normalisation"],
)
@pytest.mark.parametrize("size", [(224, 224), (300, 201), (17, 90), (1, 1)])
def test_two_steps_are_one_call_to_the_bit(make, size):
    processor = make()
    steps = Preprocessing(processor)
    resized = steps.resize(image(*size))
    assert resized.dtype == np.uint8
    assert resized.shape == steps.shape
    found = steps.normalise(resized)
    expected = processor(images=image(*size), return_tensors="pt")["pixel_values"][0]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


class Contrast(CLIPImageProcessorPil):
    """Normalises by the image, so that no table can tell what it makes of a value."""

    def normalize(self, image, mean, std, **kwargs):
        return image - image.mean()


class Old:
    """Has no switches."""

    def __call__(self, images, return_tensors):
        return {"pixel_values": [torch.zeros(3, 8, 8)]}


@pytest.mark.parametrize(
    "make",
    [Siglip2ImageProcessorPil, Contrast, Old, lambda: CLIPImageProcessorPil(do_resize=False, do_center_crop=False)],
    ids=["patches", "contrast", "no switches", "images of any size"],
)
def test_what_has_no_two_steps_is_left_whole(make):
    processor = make()
    steps = Preprocessing(processor)
    assert steps.shape is None
    assert steps.resize(image(60, 40)) is None
    expected = processor(images=image(60, 40), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(steps(image(60, 40)), expected)

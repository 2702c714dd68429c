"""What is drawn for an image, and what is made of it."""

import colorsys
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch.nn import functional as F
from transformers import HfArgumentParser

from mmap_peft import MultiTaskTrainingArguments
from mmap_peft.multitask.augmentation import RATIO, Augmentation, apply
from mmap_peft.multitask.colours import change_colours


ALL = Augmentation(("crop", "flip", "jitter"))
MANY = 2000


def noise(*size, seed=0):
    return torch.randint(0, 256, (*size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def drawn(augmentation, aspect=1.0, **of):
    return np.stack(
        [augmentation.draw(**{"seed": 3, "epoch": 1, "row": row, "aspect": aspect, **of}) for row in range(MANY)]
    )


def assert_uniform(values, low=0.0, high=1.0):
    """Kolmogorov and Smirnov: a correct generator fails with one seed of a thousand."""
    shares = (np.sort(values) - low) / (high - low)
    assert shares[0] >= 0 and shares[-1] <= 1
    assert np.abs(shares - (np.arange(len(shares)) + 0.5) / len(shares)).max() < 1.95 / math.sqrt(len(shares))


@pytest.mark.parametrize("aspect", [0.2, 0.7, 1.0, 4 / 3, 2.5, 40.0])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6)])
def test_crops_lie_in_the_picture_and_in_the_ranges_of_area_and_ratio(aspect, scale):
    left, top, right, bottom = drawn(Augmentation(("crop",), scale), aspect)[:, :4].T
    assert min(left.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 1 + 1e-9
    ratios = (right - left) / (bottom - top) * aspect  # in the real geometry of the picture
    assert ratios.min() > RATIO[0] - 1e-9 and ratios.max() < RATIO[1] + 1e-9
    areas = (right - left) * (bottom - top)
    assert areas.max() <= scale[1] + 1e-9
    fits = 0.9 < aspect < 1.1 or scale[1] * max(aspect / RATIO[1], RATIO[0] / aspect) < 0.5
    assert not fits or areas.min() >= scale[0]


def test_areas_ratios_places_and_mirrors_have_their_distributions():
    left, top, right, bottom, mirrored = drawn(Augmentation(("crop", "flip"), (0.08, 0.3)))[:, :5].T
    width, height = right - left, bottom - top
    assert_uniform(width * height, 0.08, 0.3)  # none of these crops can be too wide or too high
    assert_uniform(np.log(width / height), *np.log(RATIO))
    assert_uniform(left / (1 - width))
    assert_uniform(top / (1 - height))
    assert abs(mirrored.mean() - 0.5) < 3.3 * 0.5 / math.sqrt(MANY)


def test_colours_have_their_ranges_and_orders():
    changes = drawn(Augmentation(("jitter",), jitter=(0.4, 1.5, 0.2, 0.1)))
    for column, (low, high) in zip(changes.T[5:9], ((0.6, 1.4), (0, 2.5), (0.8, 1.2), (-0.1, 0.1))):
        assert_uniform(column, low, high)
    assert np.bincount(changes[:, 9].astype(int), minlength=24).min() > MANY / 24 / 2


def test_what_is_drawn_depends_on_seed_epoch_row_and_visit_and_on_nothing_else():
    first = ALL.draw(seed=1, epoch=2, row=3, visit=4)
    np.random.default_rng(0).random(5)
    assert np.array_equal(ALL.draw(seed=1, epoch=2, row=3, visit=4), first)
    for other in ({"seed": 2}, {"epoch": 3}, {"row": 4}, {"visit": 5}):
        assert not np.array_equal(ALL.draw(**{"seed": 1, "epoch": 2, "row": 3, "visit": 4, **other}), first)
    words = [
        ALL.draw(seed=a, epoch=b, row=c, visit=d)[0]
        for a in range(3)
        for b in range(3)
        for c in range(3)
        for d in range(3)
    ]
    assert len(set(words)) == 81  # no two of the four stand for one another


def test_a_part_is_the_same_whichever_other_parts_there_are():
    whole = drawn(ALL)
    for part, columns in (("crop", slice(0, 4)), ("flip", slice(4, 5)), ("jitter", slice(5, 10))):
        assert np.array_equal(drawn(Augmentation((part,)))[:, columns], whole[:, columns])


def test_the_numbers_are_those_of_every_version():
    found = ALL.draw(seed=7, epoch=1, row=5, aspect=1.5)
    box = [0.5534283764487211, 0.4045842989772605, 0.9063589791744305, 0.875986724105918]
    colours = [1.2017575270682999, 1.1210971654233575, 0.9328138418336115, -0.01231201550026344]
    expected = [*box, 0, *colours, 10]
    assert np.allclose(found, expected, rtol=0, atol=1e-12)


def test_an_image_does_not_depend_on_its_batch():
    pictures, changes = noise(5, 3, 40, 40), drawn(ALL)[:5]
    together = apply(changes, pictures, (20, 24))
    assert together.dtype == torch.uint8 and together.shape == (5, 3, 20, 24)
    for number in range(5):
        alone = apply(changes[[number]], pictures[[number]], (20, 24))
        assert torch.equal(alone[0], together[number])


def test_an_image_does_not_depend_on_the_number_of_threads():
    pictures, changes, threads = noise(6, 3, 450, 446), drawn(ALL)[:6], torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(apply(changes, pictures, (223, 225)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_crop_of_the_whole_picture_is_a_plain_resize():
    pictures = noise(2, 3, 40, 44)
    changes = drawn(Augmentation(("crop",), (1.0, 1.0)), aspect=1.2)[:2]
    resized = F.interpolate(pictures.float(), (20, 22), mode="bicubic", antialias=True)
    assert torch.equal(apply(changes, pictures, (20, 22)), resized.clamp(0, 255).round().byte())


def test_a_crop_has_the_pixels_of_its_rectangle():
    picture = noise(1, 3, 40, 40)
    changes = np.array([[0.25, 0.5, 0.75, 1.0, 0, 1, 1, 1, 0, 0]])
    assert torch.equal(apply(changes, picture, (20, 20))[0], picture[0, :, 20:40, 10:30])


def test_mirrored_twice_is_unchanged():
    picture, changes = noise(1, 3, 9, 8), np.array([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0]])
    once = apply(changes, picture, (9, 8))
    assert torch.equal(once, picture.flip(-1))
    assert torch.equal(apply(changes, once, (9, 8)), picture)


def test_colours_of_strength_zero_are_unchanged():
    pictures = noise(4, 3, 9, 8)
    changes = drawn(Augmentation(("jitter",), jitter=(0, 0, 0, 0)))[:4]
    assert torch.equal(apply(changes, pictures, (9, 8)), pictures)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("number", "enhance"), [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]
)
def test_brightness_contrast_and_saturation_are_those_of_pillow(number, enhance, factor):
    pixels = noise(12, 10, 3)
    expected = np.asarray(enhance(Image.fromarray(pixels.numpy())).enhance(factor)).astype(float)
    changes = [1.0, 1.0, 1.0, 0.0]
    changes[number] = factor
    found = change_colours(pixels.permute(2, 0, 1).float(), changes, range(4)).permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() < 1.01 + 0.5 * abs(1 - factor)  # Pillow works with whole numbers


@pytest.mark.parametrize("change", [-0.5, -0.1, 0.05, 1 / 3, 0.5])
def test_hue_is_that_of_colorsys(change):
    pixels = torch.cat([noise(60, 3), torch.tensor([[9, 9, 9], [0, 0, 0], [255, 0, 0], [0, 7, 7]], dtype=torch.uint8)])
    expected = []
    for pixel in pixels.tolist():
        hue, *rest = colorsys.rgb_to_hsv(*(value / 255 for value in pixel))
        expected.append([255 * value for value in colorsys.hsv_to_rgb((hue + change) % 1, *rest)])
    found = change_colours(pixels.T[:, None].float(), [1, 1, 1, change], range(4))[:, 0].T
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)


def test_the_order_of_the_colours_matters():
    image = noise(3, 6, 6).float()
    one, other = (change_colours(image, [1.4, 0.6, 1.4, 0.1], order) for order in ((0, 1, 2, 3), (3, 2, 1, 0)))
    assert not torch.equal(one, other)
    assert min(one.min(), other.min()) >= 0 and max(one.max(), other.max()) <= 255


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        *(
            ({"augment": value}, f"augment='{value}' is no choice; write 'none', or one or more of crop, flip, jitter")
            for value in ("", "blur", "crop+none", "none+flip", "crop+crop", "crop flip", "Crop")
        ),
        ({"augment": None}, "Invalid value None for `augment`: expected a string"),
        *(
            ({"augment_scale": value}, "for `augment_scale`: expected the smallest and the largest area")
            for value in ([0.5], [0.0, 1.0], [0.6, 0.5], [0.5, 1.1], [-1.0, 1.0])
        ),
        ({"augment_scale": [0.5, float("nan")]}, "Invalid value nan for `augment_scale"),
        ({"augment_scale": 0.5}, "Invalid value 0.5 for `augment_scale`: expected a list"),
        *(
            ({"augment_jitter": value}, "for `augment_jitter`: expected four numbers")
            for value in ([0.4], [-0.1, 0.0, 0.0, 0.0], [0.4, 0.4, 0.4, 0.6])
        ),
        ({"augment": "flip", "accelerator_config": {"dispatch_batches": True}}, "with augment, each process reads"),
    ],
)
def test_bad_values_are_refused_with_a_sentence(fields, sentence, arguments):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        arguments(**fields)


def test_arguments_become_an_augmentation():
    words = ["--augment", "jitter+crop", "--augment_scale", "0.5", "1", "--augment_jitter", "0", "0.1", "0.2", "0.3"]
    (args,) = HfArgumentParser(MultiTaskTrainingArguments).parse_args_into_dataclasses(words)
    assert args.augmentation == Augmentation(("crop", "jitter"), (0.5, 1.0), (0.0, 0.1, 0.2, 0.3))
    assert str(args.augmentation) == "crop(0.5, 1.0)+jitter(0.0, 0.1, 0.2, 0.3)"
    assert MultiTaskTrainingArguments().augmentation is None

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mmap_peft.multitask import decoding
from mmap_peft.multitask.decoding import decode, decode_all


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
GREY = PIXELS[..., 0]


def saved(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def forms(content, folder):
    """The same picture in all forms."""
    path = folder / "picture"
    path.write_bytes(content)
    with Image.open(path) as image:
        image.load()
    array = np.asarray(image)
    channels_first = array if array.ndim == 2 else np.moveaxis(array, -1, 0)
    forms = [str(path), path, content, bytearray(content), io.BytesIO(content), image, array]
    forms += [{"bytes": content, "path": None}, {"bytes": None, "path": str(path)}, channels_first, array.tolist()]
    forms += [torch.tensor(array), torch.tensor(channels_first), torch.tensor(channels_first / 255), array / 255]
    forms += [array.astype(np.int64), array.astype(np.float32), array.astype(np.uint16) * 257]
    return forms + ([array[..., None], torch.tensor(array)[None]] if array.ndim == 2 else [])


@pytest.mark.parametrize("pixels", [PIXELS, GREY, np.dstack([PIXELS, np.full((20, 31), 255, np.uint8)])])
def test_all_forms_are_the_same_pixels(pixels, tmp_path):
    expected = pixels[..., :3] if pixels.ndim == 3 else np.dstack([pixels] * 3)
    for form in forms(saved(Image.fromarray(pixels)), tmp_path):
        for _ in range(2):
            assert np.array_equal(decode(form), expected), type(form)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_pictures_are_turned_as_their_exif_data_say(orientation, format):
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = orientation
    content = saved(Image.fromarray(PIXELS), format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    for picture in (content, Image.open(io.BytesIO(content)), expected):
        assert np.array_equal(decode(picture), expected.convert("RGB"))


def test_damaged_exif_data_say_nothing():
    content = saved(Image.fromarray(PIXELS), exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert np.array_equal(decode(content), PIXELS)


def over_white(pixels, alpha):
    alpha = alpha[..., None] / 255
    return pixels * alpha + 255 * (1 - alpha)


ALPHA = PIXELS[::-1, ::-1, 1]
DEEP = np.random.default_rng(1).integers(0, 65536, (20, 31), np.uint16)
REAL = DEEP.astype(np.float32)
PALETTE = Image.fromarray(PIXELS).quantize(16)
RGBA = Image.fromarray(np.dstack([PIXELS, ALPHA]))
LA = Image.fromarray(np.dstack([GREY, ALPHA]))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(DEEP), DEEP / 257),
        (Image.fromarray(DEEP.astype(np.int32)), DEEP / 257),
        (Image.fromarray(GREY.astype(np.int32)), GREY),
        (Image.fromarray(DEEP.astype(np.int32) * 9 - 70), (DEEP - DEEP.min()) / np.ptp(DEEP) * 255),
        (Image.fromarray(REAL / 65535), DEEP / 257),
        (Image.fromarray(GREY.astype(np.float32)), GREY),
        (Image.fromarray(REAL * 3 - 7), (REAL - REAL.min()) / np.ptp(REAL) * 255),
        (Image.fromarray(GREY > 99), (GREY > 99) * 255),
        (PALETTE, np.asarray(PALETTE.convert("RGB"))),
        (RGBA, over_white(PIXELS, ALPHA)),
        (
            RGBA.convert("RGBa").convert("RGBA"),
            over_white(np.asarray(RGBA.convert("RGBa").convert("RGBA"))[..., :3], ALPHA),
        ),
        (LA, over_white(np.dstack([GREY] * 3), ALPHA)),
        (Image.fromarray(PIXELS).convert("CMYK"), PIXELS),
    ],
)
def test_modes(image, expected):
    expected = expected if expected.ndim == 3 else np.dstack([expected] * 3)
    assert np.abs(np.asarray(decode(image)) - expected.astype(float)).max() <= 1


@pytest.mark.parametrize("mode", ["La", "RGBa", "LAB", "HSV", "YCbCr", "RGBX", "PA", "I;16B"])
def test_rare_modes_are_read(mode):
    source = {"La": LA, "RGBa": RGBA, "PA": LA, "I;16B": Image.fromarray(GREY.astype(np.int32))}
    image = Image.new("LAB", (31, 20)) if mode == "LAB" else source.get(mode, Image.fromarray(PIXELS)).convert(mode)
    assert decode(image).size == (31, 20)


def test_transparent_colours_and_palettes_lie_on_white():
    black = Image.new("RGB", (4, 4))
    for image in (black, black.convert("L"), black.convert("P"), Image.new("I;16", (4, 4))):
        transparency = (0, 0, 0) if image.mode == "RGB" else 0
        assert np.asarray(decode(saved(image, transparency=transparency))).min() == 255
    assert np.asarray(decode(saved(Image.new("P", (4, 4)), "GIF", transparency=0))).min() == 255


def test_large_pictures_are_reduced(monkeypatch):
    monkeypatch.setattr(decoding, "MOST_PIXELS", 300)
    image = Image.fromarray(PIXELS).resize((62, 40), Image.Resampling.BILINEAR)
    expected = np.asarray(image.reduce(3), float)
    for form in (saved(image), image, saved(image, "JPEG", quality=100, subsampling=0)):
        assert decode(form).size[0] in (16, 21)
        if decode(form).size == (21, 14):
            assert np.abs(np.asarray(decode(form)) - expected).mean() < 3


def test_the_limit_is_named(monkeypatch):
    for most in (600, 200):  # Pillow warns above it, and raises an error above twice as much
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(ValueError, match=f"too many pixels for PIL.Image.MAX_IMAGE_PIXELS = {most}"):
            decode(saved(Image.fromarray(PIXELS)))


def bad_files(folder):
    """Files that hold no picture, with words of the reason."""
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes(saved(Image.fromarray(PIXELS))[:-300])
    (folder / "head.jpg").write_bytes(saved(Image.fromarray(PIXELS), "JPEG")[:50])
    reasons = {"pipe.png": "pipe", "folder.png": "folder", "loop.png": "symbolic links", "device.png": "device"}
    reasons |= {"empty.png": "empty", "text.png": "no image", "cut.png": "truncated", "head.jpg": ""}
    return {**reasons, "missing.png": "No such file", "undecodable\udcff.png": "No such file"}


def test_bad_files_are_named(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        written = name.replace("\udcff", r"\\udcff")
        with pytest.raises(ValueError, match=rf"Picture 1 of `images`, .*{written}, cannot be read \(.*{reason}"):
            decode_all([PIXELS, os.path.join(tmp_path, name)])


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4, 3), -0.5), "run from -0.5 to -0.5"),
        (np.zeros((0, 4, 3)), "no pixels"),
        (np.zeros((5, 4, 7)), r"shape \(5, 4, 7\)"),
        (np.zeros(5), r"shape \(5,\)"),
        (np.zeros((4, 4), complex), "complex128"),
        (np.zeros((1, 501), np.uint8), "strip"),
        (None, "None is no picture"),
        (5, "5 is no picture"),
        ({"path": None}, "None is no picture"),
        ({"a": 1}, "give the column of images"),
        (b"", "empty"),
        (io.StringIO("text"), "StringIO"),
    ],
)
def test_what_is_no_picture_is_refused(picture, reason):
    with pytest.raises(ValueError, match=f"Picture 0 of `images`.*{reason}"):
        decode_all([picture])
    with pytest.raises(ValueError, match=reason):
        decode(picture)

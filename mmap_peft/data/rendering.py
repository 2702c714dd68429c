"""Draw one glyph of the DejaVu Sans font as a small picture in one of several styles."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont


SIZE = 48  # pixels a side of a finished picture
CANVAS = 2 * SIZE  # drawing happens at twice the size and is averaged down


@functools.cache
def _glyph(character: str) -> Image.Image:
    """The glyph as a square grey mask whose longer side is as long as the mask."""
    import matplotlib  # slow to import

    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 2 * CANVAS)
    left, top, right, bottom = font.getbbox(character)
    side = int(max(right - left, bottom - top))
    mask = Image.new("L", (side, side), 0)
    offset = ((side - right + left) // 2 - left, (side - bottom + top) // 2 - top)
    ImageDraw.Draw(mask).text(offset, character, fill=255, font=font)
    return mask


def pose(
    character: str, rng: np.random.Generator, tilt: float, scale: tuple[float, float], slant: float
) -> np.ndarray:
    """A mask (96, 96) in [0, 1] of a glyph at a random angle, size, slant and place.

    Args:
        tilt: largest angle either way, in degrees.
        scale: least and largest length of the glyph's longer side, as a share of the picture's side.
        slant: largest shear either way.
    """
    glyph = _glyph(character)
    angle, size = np.deg2rad(rng.uniform(-tilt, tilt)), rng.uniform(*scale) * CANVAS
    shear, stretch = rng.uniform(-slant, slant), np.exp(rng.uniform(-slant, slant))
    margin = 0.7 * max(CANVAS - size, 0.0) / 2
    centre = CANVAS / 2 + rng.uniform(-margin, margin, size=2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = turn @ np.array([[stretch, shear], [0.0, 1.0 / stretch]]) * (size / glyph.width)
    inverse = np.linalg.inv(forward)
    origin = glyph.width / 2 - inverse @ centre
    matrix = (*inverse[0], origin[0], *inverse[1], origin[1])
    posed = glyph.transform((CANVAS, CANVAS), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(posed, dtype=np.float32) / 255.0


def _filtered(array: np.ndarray, image_filter: ImageFilter.Filter) -> np.ndarray:
    """A filter of PIL on a float array (H, W) or (H, W, 3) in [0, 1]."""
    image = Image.fromarray(np.clip(array * 255, 0, 255).astype(np.uint8))
    return np.asarray(image.filter(image_filter), dtype=np.float32) / 255.0


def blur(array: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur; radius in pixels."""
    return _filtered(array, ImageFilter.GaussianBlur(radius))


def grow(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask with `width` more pixels all around (an odd number counts as the next lower even one)."""
    return _filtered(mask, ImageFilter.MaxFilter(2 * (width // 2) + 1))


def edges(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask's outline, a band of about `width` pixels."""
    return np.clip(grow(mask, width) - _filtered(mask, ImageFilter.MinFilter(2 * (width // 2) + 1)), 0, 1)


def clouds(rng: np.random.Generator, coarse: int) -> np.ndarray:
    """Smooth noise (96, 96) in [0, 1] with about `coarse` bumps a side."""
    grid = Image.fromarray(rng.integers(0, 256, (coarse, coarse), dtype=np.uint8))
    return np.asarray(grid.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC), dtype=np.float32) / 255.0


def hue(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """A random colour, RGB in [0, 1], with saturation and value drawn from the given ranges."""
    h, s, v = rng.uniform(0, 6), rng.uniform(*saturation), rng.uniform(*value)
    wheel = np.clip(np.abs((h + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return (v * (1 - s + s * wheel)).astype(np.float32)


def grey(value: float) -> np.ndarray:
    """A grey, RGB in [0, 1]."""
    return np.full(3, value, dtype=np.float32)


def paper(colour: np.ndarray) -> np.ndarray:
    """A flat ground (96, 96, 3)."""
    return np.broadcast_to(colour, (CANVAS, CANVAS, 3)).astype(np.float32)


def over(ground: np.ndarray, mask: np.ndarray, paint: np.ndarray) -> np.ndarray:
    """Paint (3,) or (96, 96, 3) over ground where the mask (96, 96) is."""
    return ground + mask[..., None] * (paint - ground)


def finish(picture: np.ndarray) -> Image.Image:
    """A float picture (96, 96, 3) in [0, 1] as an RGB image of 48 x 48."""
    image = Image.fromarray(np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_print(character: str, rng: np.random.Generator) -> Image.Image:
    """Black ink on white paper, as a coarse halftone, worn."""
    mask = pose(character, rng, tilt=20, scale=(0.55, 0.95), slant=0.14)
    y, x = np.mgrid[:CANVAS, :CANVAS]
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(6.0, 9.0)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    dots = np.cos(u * 2 * np.pi / pitch) + np.cos(v * 2 * np.pi / pitch)
    wear = np.clip(1.6 * clouds(rng, 24) + rng.uniform(0.1, 0.5), 0, 1)
    ink = blur(mask * (dots > rng.uniform(-0.9, -0.4)), rng.uniform(0.3, 1.0)) * wear
    return finish(over(paper(grey(rng.uniform(0.9, 1.0))), ink, grey(rng.uniform(0.0, 0.25))))


def draw_clipart(character: str, rng: np.random.Generator) -> Image.Image:
    """A sticker: flat colours, a dark outline with a white border around it, and its shadow, sometimes on a disc."""
    mask = pose(character, rng, tilt=12, scale=(0.65, 0.95), slant=0.1)
    picture = paper(hue(rng, (0.1, 0.6), (0.8, 1.0)))
    if rng.random() < 0.6:
        y, x = np.mgrid[:CANVAS, :CANVAS] - CANVAS / 2
        disc = (np.hypot(x, y) < rng.uniform(0.38, 0.5) * CANVAS).astype(np.float32)
        picture = over(picture, disc, hue(rng, (0.4, 1.0), (0.5, 1.0)))
    border = grow(mask, int(rng.integers(5, 8)))
    shadow, outline = 0.3 * np.roll(border, (3, 3), axis=(0, 1)), grow(mask, 3)
    for layer, paint in ((shadow, grey(0)), (border, grey(1)), (outline, grey(0.1))):
        picture = over(picture, layer, paint)
    return finish(over(picture, mask, hue(rng, (0.5, 1.0), (0.2, 0.9))))


def draw_sketch(character: str, rng: np.random.Generator) -> Image.Image:
    """Broken pencil edges, drawn twice, on toned paper."""
    mask = pose(character, rng, tilt=20, scale=(0.6, 0.95), slant=0.1)
    picture = paper(hue(rng, (0.0, 0.2), (0.8, 1.0))) - 0.08 * rng.random((CANVAS, CANVAS, 1), dtype=np.float32)
    graphite = grey(rng.uniform(0.1, 0.4))
    for _ in range(2):
        dx, dy = rng.integers(-2, 3, size=2)
        broken = np.clip(3.0 * (clouds(rng, 14) - rng.uniform(0.1, 0.3)), 0, 1)
        stroke = np.roll(edges(mask, 3), (dx, dy), axis=(0, 1)) * broken
        picture = over(picture, blur(stroke, 0.6) * rng.uniform(0.5, 0.9), graphite)
    y, x = np.mgrid[:CANVAS, :CANVAS]
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(5, 9)
    hatch = (np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / pitch) > 0.4).astype(np.float32)
    return finish(over(picture, 0.35 * hatch * mask, graphite))


def draw_photo(character: str, rng: np.random.Generator) -> Image.Image:
    """An object of uneven colour with its shadow on a textured ground, lit from a side, blurred and noisy."""
    mask = blur(pose(character, rng, tilt=22, scale=(0.6, 0.95), slant=0.14), 0.7)
    light, dark = hue(rng, (0.0, 0.5), (0.75, 1.0)), hue(rng, (0.1, 0.6), (0.45, 0.75))
    texture = 0.6 * clouds(rng, int(rng.integers(4, 10))) + 0.4 * clouds(rng, int(rng.integers(16, 40)))
    picture = dark + texture[..., None] * (light - dark)
    dx, dy = rng.integers(-6, 7, size=2)
    picture = over(picture, 0.6 * blur(np.roll(mask, (dx, dy), axis=(0, 1)), 2.5), grey(0))
    picture = over(picture, mask, hue(rng, (0.2, 1.0), (0.1, 0.5)) * (0.5 + clouds(rng, 6))[..., None])
    y, x = np.mgrid[:CANVAS, :CANVAS] / CANVAS - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    picture = picture * (1 + rng.uniform(0.2, 0.7) * (np.cos(angle) * x + np.sin(angle) * y))[..., None]
    picture = blur(picture, rng.uniform(0.5, 2.0))
    return finish(picture + rng.normal(0, 0.06, picture.shape).astype(np.float32))


STYLES = {"print": draw_print, "clipart": draw_clipart, "sketch": draw_sketch, "photo": draw_photo}

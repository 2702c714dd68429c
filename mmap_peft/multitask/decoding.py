"""One picture, in any form that people have, as a PIL image in RGB."""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..checking import shortened


MOST_PIXELS = 16_000_000  # larger pictures are made smaller by a whole factor before anything else is done
LONGEST_STRIP = 500  # times its width: the processor would make a picture of gigabytes of a longer one

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # tag of EXIF
_ARRAY_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by the number of channels


def decode(picture: Any) -> Image.Image:
    """A picture as a PIL image in RGB, upright as its EXIF data say.

    Transparent pictures are put on white, and the first frame is taken of animated ones. Values of 16 bits are scaled
    by 255 / 65535. Other integers are taken as bytes if none is above 255, as 16 bits if none is above 65535. Floats
    are scaled by 255 if they are from 0 to 1, and taken as bytes if they are from 0 to 255. A PIL image of mode `I` or
    `F` with other values is scaled by its own lowest and highest one; an array with other values is refused.

    Pictures of more than `MOST_PIXELS` are reduced by a whole factor, so that they have fewer; JPEG files while they
    are decoded, which takes little memory. With more than `PIL.Image.MAX_IMAGE_PIXELS` after that they are refused.

    Args:
        picture: a path, a file's bytes, an open file, `{"bytes": ..., "path": ...}` as undecoded images of `datasets`,
            a PIL image, or an array or tensor, (height, width), (height, width, channels) or (channels, height,
            width), with 1 to 4 channels: grey, grey and alpha, RGB, RGB and alpha. Where both fit, channels are last
            in an array and first in a tensor.

    Raises:
        ValueError: it is no picture; the message is the reason only, such as "it is a folder".
    """
    try:
        return _in_rgb(_opened(picture))
    except UnidentifiedImageError:
        reason = "it is no image of a format that Pillow knows, or it is damaged"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reason = _too_large()
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error)
    except Exception as error:  # decoders raise different exceptions for broken files
        reason = f"{type(error).__name__}: {error}"
    reason = " ".join(reason.split())
    raise ValueError(reason if len(reason) <= 150 else f"{reason[:147]}...")


def decode_all(pictures: Any) -> list[Image.Image]:
    """One picture, or several in a list, an array, a column or a generator, as PIL images in RGB.

    Raises:
        ValueError: one is no picture; the message has its position.
    """
    if _is_one(pictures):
        pictures = [pictures]
    elif not isinstance(pictures, Iterable):
        raise ValueError(f"Invalid value {shortened(pictures)} for `images`: expected a picture, or a list of them.")
    found = []
    for number, picture in enumerate(pictures):
        try:
            found.append(decode(picture))
        except ValueError as error:
            name = named(picture)
            raise ValueError(
                f"Picture {number} of `images`{f', {name},' if name else ''} cannot be read ({error}); repair it or "
                "leave it out."
            ) from error
    return found


def named(picture: Any) -> str:
    """The name of a picture's file as it is written in errors, or an empty string."""
    if isinstance(picture, Mapping):
        picture = picture.get("path")
    elif not isinstance(picture, str | os.PathLike):
        picture = getattr(picture, "filename", None) or getattr(picture, "name", None)
    if not isinstance(picture, str | Path):
        picture = str(getattr(picture, "path", picture)) if isinstance(picture, os.PathLike) else ""
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(picture))
    return text if len(text) <= 200 else f"...{text[-197:]}"


def is_stored(picture: Any) -> bool:
    """Whether a picture is the same whenever it is decoded: a path, a file's bytes, or an undecoded image."""
    return isinstance(picture, str | os.PathLike | bytes | Mapping)


def _is_one(pictures: Any) -> bool:
    if isinstance(pictures, torch.Tensor | np.ndarray):
        numbers = isinstance(pictures, torch.Tensor) or pictures.dtype.kind in "buifc"
        return numbers and pictures.ndim < 4
    return is_stored(pictures) or isinstance(pictures, bytearray | Image.Image) or hasattr(pictures, "read")


def _opened(picture: Any) -> Image.Image:
    if isinstance(picture, Mapping):
        if not {"bytes", "path"} & set(picture):
            raise ValueError(f"{shortened(picture)} is no picture: give the column of images, such as data['image']")
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, Image.Image):
        return _loaded(picture)
    if isinstance(picture, str | os.PathLike):
        path = os.fspath(picture)
        _check_file(os.stat(path))
        with open(path, "rb") as file:
            return _read(file)
    if isinstance(picture, bytes | bytearray):
        if not picture:
            raise ValueError("it is empty")
        return _read(io.BytesIO(picture))
    if hasattr(picture, "read"):
        return _read(picture)
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu()
        return _from_array((picture.float() if picture.is_floating_point() else picture).numpy(), first=True)
    if hasattr(picture, "__array__") or isinstance(picture, list):
        return _from_array(np.asarray(picture), first=False)
    raise ValueError(f"{shortened(picture)} is no picture: give a path, bytes, a PIL image, an array or a tensor")


def _check_file(status: os.stat_result) -> None:
    """Raise a `ValueError` for what is no regular file: a pipe would be waited for, and a device has no end."""
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"it is a {'folder' if stat.S_ISDIR(status.st_mode) else 'pipe or device'}, no file")
    if not status.st_size:
        raise ValueError("the file is empty")


def _read(file: Any) -> Image.Image:
    image = Image.open(file)
    if image.format == "JPEG" and _factor(image.size) > 1:
        image.draft(None, tuple(max(side // _factor(image.size), 1) for side in image.size))
    return _loaded(image)


def _loaded(image: Image.Image) -> Image.Image:
    _check_size(image.size)
    image.load()  # before the orientation is asked for: Pillow itself turns TIFF files
    return image


def _too_large() -> str:
    return (
        f"it has too many pixels for PIL.Image.MAX_IMAGE_PIXELS = {Image.MAX_IMAGE_PIXELS}; make it smaller, or raise "
        "that limit"
    )


def _check_size(size: tuple[int, int]) -> None:
    if not min(size):
        raise ValueError(f"it has no pixels: {size[0]} x {size[1]}")
    if max(size) > LONGEST_STRIP * min(size):
        raise ValueError(f"its {size[0]} x {size[1]} pixels are a strip, at most 1 to {LONGEST_STRIP} is possible")
    if Image.MAX_IMAGE_PIXELS is not None and math.prod(size) > Image.MAX_IMAGE_PIXELS:
        raise ValueError(_too_large())


def _factor(size: tuple[int, int]) -> int:
    return math.ceil(math.sqrt(math.prod(size) / MOST_PIXELS))


def _in_rgb(image: Image.Image) -> Image.Image:
    _check_size(image.size)
    orientation = _orientation(image)
    image = _CONVERTERS.get(image.mode.partition(";")[0], _on_white)(image)
    if _factor(image.size) > 1:
        image = image.reduce(_factor(image.size))
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # EXIF data that are damaged say nothing
        return None


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """An image of one channel with other values than bytes."""
    values = np.asarray(image)
    grey, transparent = _as_bytes(values, stretch=True), image.info.get("transparency")
    grey = np.where(values == transparent, np.uint8(255), grey) if isinstance(transparent, int) else grey
    return Image.fromarray(grey).convert("RGB")


def _lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms  # needs a library that some builds of Pillow lack

    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))


_CONVERTERS: dict[str, Callable[[Image.Image], Image.Image]] = {"I": _grey, "F": _grey, "LAB": _lab}


def _from_array(values: np.ndarray, first: bool) -> Image.Image:
    shape = values.shape
    places = [place for place in ((0, -1) if first else (-1, 0)) if len(shape) == 3 and shape[place] in _ARRAY_MODES]
    if len(shape) != 2 and not places:
        raise ValueError(f"an array of shape {shortened(shape)} is no picture; expected (height, width, 1, 3 or 4)")
    if not values.size:
        raise ValueError(f"an array of shape {shortened(shape)} has no pixels")
    if len(shape) == 3:
        values = np.moveaxis(values, places[0], -1)
        values = values[..., 0] if values.shape[-1] == 1 else values
    return Image.fromarray(np.ascontiguousarray(_as_bytes(values, stretch=False)))


def _as_bytes(values: np.ndarray, stretch: bool) -> np.ndarray:
    """Values of a picture as bytes, as [`decode`] says; `stretch` scales all values that are neither."""
    kind = values.dtype.kind
    if kind not in "buif":
        raise ValueError(f"an array of {values.dtype} is no picture; expected integers or floats")
    if values.dtype == np.uint8:
        return values
    if kind == "f" and not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    low, high = float(values.min()), float(values.max())
    if kind == "b" or (kind == "f" and low >= 0 and high <= 1):
        scale = 255.0
    elif values.dtype.itemsize == 2 and kind == "u":
        scale = 255 / 65535
    elif low >= 0 and high <= 255:
        scale = 1.0
    elif low >= 0 and high <= 65535 and kind != "f":
        scale = 255 / 65535
    elif stretch:
        values, scale = values - np.float64(low), 255 / ((high - low) or 1)
    else:
        raise ValueError(f"its values run from {low:g} to {high:g}; expected 0 to 255, or floats from 0 to 1")
    return np.rint(values * np.float64(scale)).astype(np.uint8)

"""Pictures of all kinds, whole or damaged, in all forms: their pixels are right, or a sentence names the picture."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from mmap_peft import MultiTaskClassifier, Task, load_processor
from mmap_peft.data.pictograms import small_clip
from mmap_peft.multitask.images import TaskImages
from tests.conftest import tiny_clip

from .campaigns import Campaign, one_sentence


NAMES = ["Alarm_Clock", "Bed", "TV"]
ORIENTATION = 0x0112
MODES = ["1", "L", "LA", "P", "P+", "RGB", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "L+", "RGB+"]
FORMATS = {
    "PNG": ["1", "L", "LA", "P", "P+", "RGB", "RGBA", "I;16", "L+", "RGB+"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["P", "P+"],
    "BMP": ["1", "L", "P", "RGB"],
}
shared = SimpleNamespace()


def prepare() -> None:
    shared.processor = load_processor(small_clip())
    shared.classifier = MultiTaskClassifier(tiny_clip(), shared.processor, [Task("art", NAMES)])
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    shared.whole = Image.fromarray(pixels)
    shared.classifier.predict(shared.whole, "art")


def picture(rng: random.Random, mode: str) -> tuple[Image.Image, np.ndarray, dict[str, Any]]:
    """A picture, what it shows in RGB by numpy alone, and options of `save`."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    shape = rng.choice([(1, 1), (3, 40), (40, 3), (48, 48), (50, 64), (90, 71), (200, 30)])
    rgb = numbers.integers(0, 256, (*shape, 3), np.uint8)
    grey, alpha = rgb[..., 0], numbers.choice([0, 255, 255, 128], shape).astype(np.uint8)
    if mode in ("I;16", "I", "F"):
        deep = numbers.integers(0, 65536, shape).astype(np.uint16)
        deep.flat[0] = 65535
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray((deep / np.float32(65535) if mode == "F" else deep).astype(kind)), deep / 257, {}
    if mode in ("P", "P+", "L+", "RGB+"):
        image = Image.fromarray(grey if mode == "L+" else rgb)
        image = image.quantize(8) if mode[0] == "P" else image
        first = image.getpixel((0, 0))
        shown, index = np.asarray(image.convert("RGB")).astype(float), np.asarray(image)
        if mode == "RGB+":
            shown[(index == first).all(-1)] = 255
        elif mode[-1] == "+":
            shown[index == first] = 255
        return image, shown, {"transparency": first} if mode[-1] == "+" else {}
    if mode == "1":
        return Image.fromarray(grey > 127), np.where(grey > 127, 255, 0), {}
    if mode in ("LA", "RGBA"):
        colours = grey[..., None] if mode == "LA" else rgb
        share = alpha[..., None] / 255
        return Image.fromarray(np.dstack([colours, alpha])), colours * share + 255 * (1 - share), {}
    if mode == "CMYK":
        return Image.fromarray(rgb).convert("CMYK"), rgb, {}
    return Image.fromarray(grey if mode == "L" else rgb), grey if mode == "L" else rgb, {}


def turned(shown: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels as EXIF says that they are to be shown."""
    ways = {2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1)}
    ways |= {6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x)}
    return ways.get(orientation, lambda x: x)(shown)


def forms(content: bytes, path: Path, plain: np.ndarray | None) -> dict[str, Any]:
    """The same picture in all forms. `plain` has the pixels of one that needs no conversion."""
    found = {"str": str(path), "path": path, "bytes": content, "file": io.BytesIO(content)}
    found |= {"stored": {"bytes": content, "path": None}, "link": {"bytes": None, "path": str(path)}}
    found["image"] = Image.open(io.BytesIO(content))
    if plain is not None:
        found |= {"array": plain, "floats": plain / 255, "double": plain / np.float32(1), "int64": plain.astype(int)}
        found |= {"deep": plain.astype(np.uint16) * 257, "list": plain.tolist()}
        if plain.shape[0] > 4 < plain.shape[1]:  # else it is not clear which are the channels
            found |= {"first": np.moveaxis(plain, -1, 0), "first tensor": torch.tensor(plain.copy()).movedim(-1, 0)}
            found |= {"tensor": torch.tensor(plain.copy())}
    return found


def task_of(rng: random.Random, pictures: list[Any], labels: list[int]) -> Task:
    """A task with these images, in a random form of data."""
    names = [rng.choice([name, name.upper(), name.replace("_", " ")]) for name in (NAMES[n] for n in labels)]
    given = rng.choice([labels, names, np.array(labels, np.uint8), torch.tensor(labels)])
    image = rng.choice(["image", "img", "image_path", "path", "file", "picture"])
    label = rng.choice(["label", "labels", "fine_label", "class", "target"])
    ways = [lambda: [{image: p, label: n} for p, n in zip(pictures, given)], lambda: list(zip(pictures, given))]
    ways += [lambda: (pictures, given), lambda: {image: pictures, label: given}, lambda: Pairs(pictures, given)]
    ways += [lambda: torch.utils.data.Subset(Pairs(pictures[::-1], labels[::-1]), range(len(labels))[::-1])]
    if all(isinstance(each, str) for each in pictures) and all(each.isprintable() for each in pictures):
        kind = rng.choice([datasets.Image(), datasets.Value("string")])
        classes = rng.choice([NAMES, ["n01", "n02", "n03"]])
        kinds = datasets.Features({image: kind, label: datasets.ClassLabel(names=classes)})
        made = lambda: datasets.Dataset.from_dict({image: pictures, label: labels}, kinds)  # noqa: E731
        ways += [made, made, lambda: datasets.DatasetDict(train=made(), test=made())]
    data = rng.choice(ways)()
    return Task("art", NAMES, train=data, eval=data)


class Pairs:
    def __init__(self, images: Any, targets: Any) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        return self.images[number], self.targets[number]


# ---- what can be wrong with a file: each returns whether it can be read nevertheless, with any pixels


def cut(rng: random.Random, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 3, 30])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def other(rng: random.Random, path: Path) -> None:
    path.write_bytes(rng.choice([b"", b"\0" * 999, b"<html>no image</html>", b"GIF89a", b"\xff\xd8\xff", b"BM" * 40]))


def bomb(rng: random.Random, path: Path) -> None:
    size = rng.choice([(20_000, 20_000), (65_000, 65_000), (1, 60_000), (100_000, 100_000)])
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size[0].to_bytes(4) + size[1].to_bytes(4) + b"\x08\2\0\0\0")
    path.write_bytes(header + chunk(b"IDAT", b"\x78\x9c\x63") + chunk(b"IEND", b""))


def chunk(kind: bytes, content: bytes) -> bytes:
    import zlib

    return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)


def no_file(rng: random.Random, path: Path) -> None:
    path.unlink()
    ways = [lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to(path), lambda: path.symlink_to("/dev/zero")]
    rng.choice([*ways, lambda: path.symlink_to("missing"), lambda: None, lambda: path.symlink_to("/dev/stdin")])()


def no_rights(rng: random.Random, path: Path) -> None:
    path.chmod(0)
    if not os.getuid():
        os.setuid(65534)


DAMAGES = [cut, flip, other, bomb, no_file, no_file, no_rights]
WRONG = [
    *(None, 5, "", {}, [], b"", np.full((9, 9), np.nan), np.full((9, 9, 3), np.inf), np.full((9, 9), -3.0), (1, 2)),
    *(np.full((9, 9), 300.0), np.zeros((0, 9, 3)), np.zeros((9, 9, 5)), np.zeros(9), np.zeros((9, 9), complex)),
    *(
        torch.zeros(2, 3, 9, 9),
        torch.zeros(3, 0, 9),
        torch.full((3, 9, 9), -1.0),
        object(),
        {"path": None, "bytes": None},
    ),
    *(np.array([["a", "b"]]), "no\0file", "\ud800.png", io.StringIO("text"), Image, {"bytes": "text", "path": None}),
]


def trial(rng: random.Random, folder: Path) -> None:
    mode = rng.choice(MODES)
    format = rng.choice([name for name, modes in FORMATS.items() if mode in modes])
    orientation = rng.choice([None, *range(1, 9)]) if format in ("PNG", "JPEG", "TIFF", "WEBP") else None
    image, shown, options = picture(rng, mode)
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    if format in ("JPEG", "WEBP"):
        options |= {"lossless": True, "exact": True} if format == "WEBP" else {"quality": 100, "subsampling": 0}
    names = ["a.png", "写真.jpg", "a b's.png", "a\u202eb.png", "x" * 200, os.fsdecode(b"\xff\xfe.png"), "a.txt"]
    path = folder / rng.choice(names)
    image.save(path, format, **options)
    damage = rng.choice(DAMAGES) if rng.random() < 0.5 else None
    if damage is None and rng.random() < 0.2:
        return wrong_form(rng)
    if damage is not None:
        return damaged(rng, path, damage)
    content = path.read_bytes()
    right(rng, content, path, mode, format, turned(shown, orientation or 1))
    return None


def right(rng: random.Random, content: bytes, path: Path, mode: str, format: str, shown: np.ndarray) -> None:
    """All forms of a picture have the pixels that it shows, to a rounding, and exactly the same ones."""
    shown = np.broadcast_to(shown if shown.ndim == 3 else shown[..., None], (*shown.shape[:2], 3)).astype(float)
    rounded = Image.fromarray(np.rint(shown).astype(np.uint8))
    plain = np.asarray(rounded) if mode in ("1", "L", "RGB", "P") and format != "JPEG" else None
    several = forms(content, path, plain)
    chosen = rng.sample(list(several), min(len(several), rng.choice([1, 3, 30])))
    pictures = [several[name] for name in chosen]
    labels = [rng.randrange(3) for _ in chosen]
    task = task_of(rng, pictures, labels)
    expected = pixels_of(rounded)
    first = None
    for split in ("train", "eval"):
        images = TaskImages([task], split, shared.processor.image_processor)
        for number in (*range(len(images)), *range(len(images))):
            found = images[number]
            assert found["labels"] == labels[number], (mode, format, chosen[number])
            first = found["pixel_values"] if first is None else first
            assert torch.equal(found["pixel_values"], first), ("forms differ", mode, format, chosen[0], chosen[number])
    limit = 0.6 if format == "JPEG" else 0.05  # 0.014 is one of 255 steps
    assert (first - expected).abs().max() < limit, (mode, format, float((first - expected).abs().max()))
    predictions = shared.classifier.predict(rng.choice([pictures, tuple(pictures), iter(pictures)]), "art")
    one = shared.classifier.predict(pictures[0], "art") if not isinstance(pictures[0], list) else predictions
    for row in predictions.probabilities:
        torch.testing.assert_close(row, one.probabilities[0], atol=1e-5, rtol=1e-4)
    assert shared.classifier.predict([], "art").probabilities.shape == (0, 3)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return shared.processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]


def damaged(rng: random.Random, path: Path, damage: Any) -> None:
    """A damaged file is named, or read: then in the same way each time."""
    damage(rng, path)
    name = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in path.name)
    given = rng.choice([str(path), path, {"bytes": None, "path": str(path)}])
    images = TaskImages([task_of(rng, [given, shared.whole], [1, 2])], rng.choice(["train", "eval"]), processor())
    found = [one_sentence(lambda: images[0]["pixel_values"], name[-150:]) for _ in range(2)]
    predicted = one_sentence(lambda: shared.classifier.predict([shared.whole, given], "art"), name[-150:])
    assert (found[0] is None) == (found[1] is None) == (predicted is None)
    assert damage in (flip, cut) or found[0] is None, "read nevertheless"
    if predicted is None:
        one_sentence(lambda: shared.classifier.predict([shared.whole, given], "art"), "1")
    else:
        assert torch.equal(*found)
        assert predicted.probabilities.isfinite().all()
    assert torch.equal(images[1]["pixel_values"], pixels_of(shared.whole))
    skipping = TaskImages([task_of(rng, [given, shared.whole], [1, 2])], "train", processor(), unreadable="skip")
    assert skipping[0]["labels"] == (-100 if predicted is None else 1)


def processor() -> Any:
    return shared.processor.image_processor


def wrong_form(rng: random.Random) -> None:
    """What is no picture is refused with its position."""
    wrong = rng.choice(WRONG)
    place = rng.randrange(3)
    pictures = [shared.whole] * place + [wrong] + [shared.whole] * (2 - place)
    assert one_sentence(lambda: shared.classifier.predict(pictures, "art"), f" {place} ") is None, wrong
    images = TaskImages([Task("art", NAMES, train=[(each, 0) for each in pictures])], "train", processor())
    assert one_sentence(lambda: images[place], f"number {place}", "Image") is None, wrong


CAMPAIGN = Campaign(trial, trials=80, few=12, prepare=prepare, seconds=30)

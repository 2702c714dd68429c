"""Measuring how many images per second are read, with and without workers and kept images."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from mmap_peft.data.pictograms import small_clip
from mmap_peft.multitask.files import write_json
from mmap_peft.multitask.images import TaskImages, collate
from mmap_peft.multitask.loading import load_processor
from mmap_peft.multitask.task import Task

from .machine import origin
from .tables import head_lines, table_lines


CACHE_BYTES = 4e9


def measure_loading(
    out: Path, workers: Sequence[int], images: int = 1000, side: int = 400, epochs: int = 3, batch: int = 32
) -> str:
    """Time how fast JPEG files are read and prepared for CLIP (224 x 224 pixels) as `MultiTaskTrainer` does it, with
    and without kept images. The files are made for it. Writes `loading.json` and `loading.md`.

    Args:
        out (`Path`): folder of these two files.
        workers: numbers of processes that read; 0: the main process reads.
        images, side (`int`): number of JPEG files; their height and width in pixels.
        epochs, batch (`int`): passes over all images; images of a batch.

    Returns:
        The text of `loading.md`.

    Raises:
        ValueError: `images`, `epochs` or `batch` is less than 1, or `side` is less than 16.
    """
    if min(images, side // 16, epochs, batch) < 1:
        raise ValueError(
            f"{images} images of {side} pixels in {epochs} epochs of batches of {batch} measure nothing; write 1 or "
            "more, and 16 pixels or more."
        )
    processor = type(load_processor(small_clip()).image_processor)()  # CLIP's usual size, not the small one's
    settings = {"images": images, "side": side, "batch": batch, "cache GB": CACHE_BYTES / 1e9}
    measurement = {**origin(), "settings": settings, "loading": []}
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=2 * len(workers) * epochs, disable=None, unit="epoch") as bar,
    ):
        task = _task(Path(folder), images, side)
        for count, cached in itertools.product(workers, (False, True)):
            data = TaskImages([task], "train", processor, cache_bytes=CACHE_BYTES * cached)
            loader = DataLoader(
                data, batch, shuffle=True, num_workers=count, collate_fn=collate, persistent_workers=count > 0
            )
            seconds = [_seconds_of_an_epoch(loader, bar) for _ in range(epochs)]
            measurement["loading"].append({"workers": count, "cached": cached, "seconds": seconds})
            write_json(measurement, out / "loading.json")
            del loader, data  # ends the workers
    text = loading_text(measurement)
    (out / "loading.md").write_text(text)
    return text


def _seconds_of_an_epoch(loader: DataLoader, bar: tqdm) -> float:
    start = time.perf_counter()
    for _ in loader:
        pass
    bar.update()
    return time.perf_counter() - start


def loading_text(measurement: dict[str, Any]) -> str:
    """The text of `loading.md` from the fields of `loading.json`."""
    epochs = len(measurement["loading"][0]["seconds"])
    images = measurement["settings"]["images"]
    heads = ["workers", "kept", *(f"epoch {number + 1}, images/s" for number in range(epochs))]
    rows = [
        [one["workers"], "yes" if one["cached"] else "no", *(f"{images / seconds:.0f}" for seconds in one["seconds"])]
        for one in measurement["loading"]
    ]
    return "\n".join([*head_lines("Loading", measurement), *table_lines(heads, rows), ""])


def _task(folder: Path, images: int, side: int) -> Task:
    """A task of JPEG files with coarse and fine structure, as photographs have."""
    rng, files = np.random.default_rng(0), []
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
        fine = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) // 2 + rng.integers(
            0, 64, (side, side, 1)
        )
        files.append(str(folder / f"{number}.jpg"))
        Image.fromarray(fine.astype(np.uint8)).save(files[-1], quality=90)
    data = datasets.Dataset.from_dict({"image": files, "label": [0] * images})
    return Task("pictures", ["one", "other"], train=data.cast_column("image", datasets.Image()))

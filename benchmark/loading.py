"""How many images a second are read, with and without workers and kept images."""

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
from mmap_peft.multitask.saving import load_processor
from mmap_peft.multitask.task import Task

from .speed import origin_lines, origin_of, table


CACHE_BYTES = 4e9


def measure_loading(
    out: Path, workers: Sequence[int], images: int = 1000, side: int = 400, epochs: int = 3, batch: int = 32
) -> str:
    """Time epochs over JPEG files of our own making, as `MultiTaskTrainer` reads them for CLIP's 224 x 224 pixels;
    write `loading.json` and `loading.md`.

    Args:
        out (`Path`): folder of these files.
        workers: numbers of processes that read; 0: the one that waits for the images.
        images, side: how many files, and their height and width in pixels.
        epochs, batch: passes over all of them; images of a batch.

    Returns:
        The text of `loading.md`.

    Raises:
        ValueError: numbers that measure nothing.
    """
    if min(images, side // 16, epochs, batch) < 1:
        raise ValueError(
            f"{images} images of {side} pixels in {epochs} epochs of batches of {batch} measure nothing; write 1 or "
            "more, and 16 pixels or more."
        )
    processor = type(load_processor(small_clip()).image_processor)()  # of the size that larger CLIPs have
    settings = {"images": images, "side": side, "batch": batch, "cache GB": CACHE_BYTES / 1e9}
    found = {**origin_of(**settings), "loading": []}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        task = _task(Path(folder), images, side)
        bar = tqdm(total=2 * len(workers) * epochs, disable=None, unit="epoch")
        for count, cached in itertools.product(workers, (False, True)):
            data = TaskImages([task], "train", processor, cache_bytes=CACHE_BYTES * cached)
            loader = DataLoader(
                data, batch, shuffle=True, num_workers=count, collate_fn=collate, persistent_workers=count > 0
            )
            seconds = []
            for _ in range(epochs):
                start = time.perf_counter()
                for _ in loader:
                    pass
                seconds.append(time.perf_counter() - start)
                bar.update()
            found["loading"].append({"workers": count, "cached": cached, "seconds": seconds})
            write_json(found, out / "loading.json")
            del loader, data
        bar.close()
    text = loading_text(found)
    (out / "loading.md").write_text(text)
    return text


def loading_text(found: dict[str, Any]) -> str:
    """What `measure_loading` found, as Markdown."""
    one, *_ = found["loading"]
    heads = ["workers", "kept", *(f"epoch {number + 1}, images/s" for number in range(len(one["seconds"])))]
    rows = [
        [
            one["workers"],
            "yes" if one["cached"] else "no",
            *(f"{found['settings']['images'] / seconds:.0f}" for seconds in one["seconds"]),
        ]
        for one in found["loading"]
    ]
    return "\n".join(["# Loading", "", *origin_lines(found), "", *table(heads, rows), ""])


def _task(folder: Path, images: int, side: int) -> Task:
    """Pictures with something coarse and something fine in them, as photographs have."""
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

"""Perceptual hashes, which tell copies of a picture in another size or compression, each computed once and kept."""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from transformers.utils.logging import tqdm

from ..multitask.decoding import decode
from ..multitask.files import replace_file
from ..multitask.processes import cores


logger = logging.getLogger(__name__)

HASHING = "1"  # change this whenever hashes change, so that those that were kept before are not used
# Chosen on Pictograms: of copies in half to three times the size, or as JPEG files of quality 50, 99 to 100 % differ
# by no more (of quality 25, 58 to 99 %); of all pairs of different pictures in a style, of 1800 each, one does.
MOST_BITS = 6  # of 64
MOST_COLOUR = 2.2  # of 255, mean over the colours

HASH = np.dtype([("bits", np.uint8, 8), ("colours", np.uint8, 48)])
_SIDE, _KEPT_AT_ONCE = 32, 10_000
_FREQUENCIES = np.cos(np.pi * np.outer(np.arange(1, 9), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
_LUMINANCE = np.array([0.299, 0.587, 0.114])
_KEPT = pa.schema({"key": pa.binary(16), "hash": pa.binary(HASH.itemsize)})


def picture_hash(image: Image.Image) -> np.ndarray:
    """The hash of an RGB picture, a scalar of `HASH`.

    `bits` are 64: the picture is scaled to 32 x 32 pixels; of the discrete cosine transform of its luminance, the 8 x
    8 lowest frequencies without those that are constant along a side; each is compared with their median (a pHash:
    Zauner, *Implementation and Benchmarking of Perceptual Image Hash Functions*, 2010). `colours` is the picture in
    4 x 4 pixels, our addition: it tells drawings of one shape in several colours, which have the same bits.
    """
    small = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    waves = _FREQUENCIES @ (small @ _LUMINANCE) @ _FREQUENCIES.T
    found = np.zeros((), HASH)
    found["bits"] = np.packbits(waves > np.median(waves))
    found["colours"] = np.rint(small.reshape(4, 8, 4, 8, 3).mean(axis=(1, 3))).reshape(-1)
    return found


def nearest(hashes: np.ndarray, others: np.ndarray, pairs_at_once: int = 2**20) -> np.ndarray:
    """For each hash the number of a near-duplicate among the others, of several that with the most bits in common; -1
    if there is none."""
    found = np.full(len(hashes), -1)
    signs = [2 * np.unpackbits(each["bits"], axis=-1).astype(np.float32) - 1 for each in (hashes, others)]
    size = max(1, pairs_at_once // max(1, len(others)))
    for start in range(0, len(hashes) if len(others) else 0, size):
        different = (64 - signs[0][start : start + size] @ signs[1].T) / 2  # bits
        rows, columns = np.nonzero(different <= MOST_BITS)
        colours = (each["colours"].astype(np.float32) for each in (hashes[start + rows], others[columns]))
        far = np.abs(np.subtract(*colours)).mean(axis=1) > MOST_COLOUR
        different[rows[far], columns[far]] = np.inf
        best = different.argmin(axis=1)
        is_near = different[np.arange(len(best)), best] <= MOST_BITS
        found[start : start + size] = np.where(is_near, best, -1)
    return found


def hash_pictures(data: datasets.Dataset, rows: list[int], description: str) -> tuple[np.ndarray, np.ndarray]:
    """Hash pictures of a data set, in threads and with a progress bar if they are new.

    Hashes are kept in the folder of `datasets` (`HF_DATASETS_CACHE`): of files by path, size and time of change, of
    pictures in memory by their bytes.

    Args:
        data (`datasets.Dataset`): with the column `image`, of pictures as in `read_folder` or decoded ones.
        rows (`list[int]`): which of them.
        description (`str`): of the progress bar.

    Returns:
        The rows of pictures that can be read, and their hashes.
    """
    data = data.with_format(None).select_columns(["image"])
    if isinstance(data.features["image"], datasets.Image):
        data = data.cast_column("image", datasets.Image(decode=False))
    file = Path(datasets.config.HF_DATASETS_CACHE) / "mmap_peft" / f"picture_hashes_{HASHING}.parquet"
    known = _read(file)
    found: dict[bytes, bytes] = {}
    with ThreadPoolExecutor(cores()) as pool:
        all_keys = zip(rows, pool.map(lambda row: _key(data[row]["image"]), rows))
        keys = {row: key for row, key in all_keys if key is not None}
        new = [row for row in keys if keys[row] not in known]
        with tqdm(total=len(new), desc=description, disable=not new) as bar:
            for part in (new[start : start + _KEPT_AT_ONCE] for start in range(0, len(new), _KEPT_AT_ONCE)):
                for row, value in zip(part, pool.map(lambda row: _hash(data[row]["image"]), part)):
                    bar.update()
                    if value is not None:
                        found[keys[row]] = value
                _add(file, {keys[row]: found[keys[row]] for row in part if keys[row] in found})
    known |= found
    read = [row for row in rows if row in keys and keys[row] in known]
    return np.array(read, dtype=int), np.frombuffer(b"".join(known[keys[row]] for row in read), HASH)


def _key(picture: Any) -> bytes | None:
    """What a picture is known by as long as it does not change, or `None` if it cannot be read."""
    content = picture["bytes"] if isinstance(picture, dict) else None
    if content is None:
        try:
            path = os.path.realpath(picture["path"] if isinstance(picture, dict) else picture)
            state = os.stat(path)
        except (OSError, TypeError, ValueError):
            return None
        content = f"{path}\0{state.st_size}\0{state.st_mtime_ns}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(content, digest_size=16).digest()


def _hash(picture: Any) -> bytes | None:
    try:
        return picture_hash(decode(picture)).tobytes()
    except ValueError:  # training and evaluation say which picture cannot be read, or leave it out
        return None


def _read(file: Path) -> dict[bytes, bytes]:
    """The hashes that were kept; none if the file is damaged."""
    try:
        table = pq.read_table(file, schema=_KEPT, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        if file.exists():
            logger.warning("Hashes of pictures in %s cannot be read and are computed again: %s", file, error)
        return {}
    return dict(zip(*(table[name].to_pylist() for name in _KEPT.names)))


def _add(file: Path, hashes: dict[bytes, bytes]) -> None:
    """Keep more hashes, together with those that other processes have kept meanwhile."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(file) as new:
            everything = _read(file) | hashes
            pq.write_table(pa.table([list(everything), list(everything.values())], schema=_KEPT), new)
    except OSError as error:
        logger.warning("Hashes of pictures are not kept: %s", error)

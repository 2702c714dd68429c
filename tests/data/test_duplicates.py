"""Copies of test images among the training images: found in other sizes and compressions, and nothing else is."""

import io
import logging
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from mmap_peft.data import picture_hashes
from mmap_peft.data.domains import read_folder
from mmap_peft.data.duplicates import drop_duplicates, find_duplicates
from mmap_peft.data.pictograms import draw
from mmap_peft.data.picture_hashes import HASH, MOST_BITS, MOST_COLOUR, nearest, picture_hash
from mmap_peft.data.splits import Split, make_tasks


STYLES, CLASSES = ("clipart", "photo"), ("sun", "umbrella", "snowman")
COPIES = {  # names of training images, and how each is made of the test image with the same number
    "smaller.png": lambda image: image.resize((30, 30), Image.Resampling.BILINEAR),
    "larger.jpg": lambda image: image.resize((160, 160), Image.Resampling.BICUBIC),
    "wider.png": lambda image: image.resize((64, 48), Image.Resampling.BICUBIC),
    "same.png": lambda image: image,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "mmap_peft" / f"picture_hashes_{picture_hashes.HASHING}.parquet"


@pytest.fixture
def planted(tmp_path):
    """A folder of two domains, its split, and which training image is a copy of which test image."""
    split, copies, root = Split({}, {}, {"made": "here"}), {}, tmp_path / "images"
    for style in STYLES:
        split.train[style], split.eval[style] = [], []
        for class_name in CLASSES:
            (root / style / class_name).mkdir(parents=True)
            for number in range(8):
                part = split.train if number < 4 else split.eval
                part[style].append(f"{style}/{class_name}/{number}.png")
                draw(style, class_name, number).save(root / part[style][-1])
        for number, (name, change) in enumerate(COPIES.items(), start=4):
            name = f"{style}/{CLASSES[number % 3]}/{name}"
            change(draw(style, "sun", number)).save(root / name, quality=60)
            copies[name] = f"{style}/sun/{number}.png"
            split.train[style].append(name)
    return read_folder(root), split, copies, root


def found_in(domains, split):
    return {name: copy for found in find_duplicates(domains, split).values() for name, copy in found.items()}


def test_copies_are_found_and_other_images_of_the_class_are_not(planted):
    domains, split, copies, _ = planted
    assert found_in(domains, split) == copies
    left = drop_duplicates(domains, split)
    assert sum(len(files) for files in split.train.values()) - len(copies) == sum(map(len, left.train.values()))
    assert set(copies).isdisjoint(name for files in left.train.values() for name in files)
    assert left.eval == split.eval and left.source == {"made": "here", "duplicates": len(copies)}
    assert left.digest != split.digest
    assert find_duplicates(domains, left) == {style: {} for style in STYLES}
    assert drop_duplicates(domains, left).digest == left.digest
    assert [len(task.train) for task in make_tasks(domains, left)] == [12, 12]


def test_a_copy_in_another_domain_is_found(planted):
    domains, split, _, root = planted
    draw("photo", "sun", 5).save(root / "clipart" / "umbrella" / "stray.png")
    split.train["clipart"].append("clipart/umbrella/stray.png")
    domains = read_folder(root)
    assert find_duplicates(domains, split)["clipart"]["clipart/umbrella/stray.png"] == "photo/sun/5.png"


@pytest.mark.parametrize("quality", [30, 60, 90])
@pytest.mark.parametrize("side", [40, 48, 200])
def test_compression_and_size_change_a_hash_less_than_the_limits(side, quality):
    images = [draw(style, name, 1) for style in STYLES for name in CLASSES]
    copies = []
    for image in images:
        content = io.BytesIO()
        image.resize((side, side), Image.Resampling.BICUBIC).save(content, "JPEG", quality=quality)
        copies.append(np.array(picture_hash(Image.open(content).convert("RGB"))))
    hashes = np.array([picture_hash(image) for image in images], HASH)
    if quality >= 60:
        assert nearest(np.array(copies, HASH), hashes).tolist() == list(range(len(images)))
    assert all(place in (number, -1) for number, place in enumerate(nearest(np.array(copies, HASH), hashes)))


@pytest.mark.parametrize("pairs_at_once", [1, 7, 2**20])
def test_the_nearest_is_that_of_all_pairs(pairs_at_once):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (40, 64)).astype(np.uint8)
    hashes, others = np.zeros(40, HASH), np.zeros(60, HASH)
    picks, flips, shifts = rng.integers(0, 40, 60), rng.integers(0, 12, 60), rng.integers(0, 5, 60)
    hashes["bits"] = np.packbits(bits, axis=1)
    for number, (pick, flip, shift) in enumerate(zip(picks, flips, shifts)):
        changed = bits[pick].copy()
        changed[rng.permutation(64)[:flip]] ^= 1
        others["bits"][number], others["colours"][number] = np.packbits(changed), shift
    expected = []
    for mine in hashes:
        counts = [np.unpackbits(mine["bits"] ^ its["bits"]).sum() for its in others]
        far = [np.abs(mine["colours"].astype(float) - its["colours"]).mean() > MOST_COLOUR for its in others]
        near = [(count, place) for place, count in enumerate(counts) if count <= MOST_BITS and not far[place]]
        expected.append(min(near)[1] if near else -1)
    assert -1 in expected and max(expected) > 0
    assert nearest(hashes, others, pairs_at_once).tolist() == expected
    assert nearest(hashes, others[:0]).tolist() == [-1] * 40 and nearest(hashes[:0], others).tolist() == []


def test_a_hash_is_computed_once_and_again_if_the_file_changes(planted, monkeypatch, own_cache):
    domains, split, copies, root = planted
    hashed = []
    monkeypatch.setattr(picture_hashes, "picture_hash", lambda image: hashed.append(1) or picture_hash(image))
    assert found_in(domains, split) == copies
    count = len(hashed)
    assert count == sum(len(data) for data in domains.values())
    assert found_in(read_folder(root), split) == copies and len(hashed) == count
    changed = root / next(iter(copies))
    draw("photo", "umbrella", 9).save(changed)
    os.utime(changed, ns=(1, 1))
    assert found_in(domains, split) == dict(list(copies.items())[1:]) and len(hashed) == count + 1
    own_cache.write_bytes(b"damaged")
    assert found_in(domains, split) == dict(list(copies.items())[1:]) and len(hashed) == 2 * count + 1


def test_pictures_in_memory_are_hashed_by_their_bytes(own_cache):
    images = [draw("photo", "sun", number) for number in (0, 1, 0)]
    features = datasets.Features({"image": datasets.Image(), "file": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": images, "file": ["a/b/0", "a/b/1", "a/b/2"]}, features)
    split = Split({"a": ["a/b/0", "a/b/1"]}, {"a": ["a/b/2"]}, {})
    assert find_duplicates({"a": data}, split) == {"a": {"a/b/0": "a/b/2"}}
    assert own_cache.is_file()


def test_a_file_that_is_no_image_is_no_duplicate_and_a_folder_that_cannot_be_written_is_told(
    planted, own_cache, caplog
):
    domains, split, copies, root = planted
    (root / split.eval["photo"][0]).write_bytes(b"no image")
    (root / split.train["photo"][0]).write_bytes(b"no image")
    own_cache.parent.parent.mkdir()
    own_cache.parent.write_text("a file in the way")
    with caplog.at_level(logging.WARNING):
        found = found_in(domains, split)
    assert found == {name: copy for name, copy in copies.items() if copy != split.eval["photo"][0]}
    assert "Hashes of pictures are not kept" in caplog.text


def test_a_published_list_is_dropped_too(planted, tmp_path):
    domains, split, copies, _ = planted
    listed = tmp_path / "duplicates.txt"
    listed.write_text("clipart/sun/0.png\n\nPhoto/sun/1.PNG 0\nphoto/sun/4.png\nother/domain/1.jpg\n")
    left = drop_duplicates(domains, split, listed)
    dropped = {name for part in split.train.values() for name in part} - {
        name for part in left.train.values() for name in part
    }
    assert dropped == {*copies, "clipart/sun/0.png", "photo/sun/1.png"}
    assert left.eval == split.eval  # the list names one of its images
    listed.write_text("quickdraw/sun/0.png\n")
    with pytest.raises(ValueError, match=r"names no image of the data; write paths such as 'clipart/snowman/0\.png'"):
        drop_duplicates(domains, split, listed)
    listed.write_text("0.png\n")
    with pytest.raises(ValueError, match="is not of the form Domain/Class/file"):
        drop_duplicates(domains, split, listed)
    with pytest.raises(OSError, match="nowhere"):
        drop_duplicates(domains, split, tmp_path / "nowhere.txt")

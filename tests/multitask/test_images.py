import logging

import datasets
import pytest
import torch
from PIL import Image

from mmap_peft import Task
from mmap_peft.multitask.images import IGNORED, TaskImages, collate


@pytest.fixture
def files(tmp_path):
    """Two images and a file that is none."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths[:2]):
        Image.new("RGB", (60, 50), (100 * number, 0, 0)).save(path)
    paths[2].write_bytes(b"\x89PNG broken")
    return [str(path) for path in paths]


def as_paths(files):
    return [{"image": file, "label": number % 2} for number, file in enumerate(files)]


def as_dataset(files):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": files, "label": [0, 1, 0][: len(files)]}, features=features)


@pytest.mark.parametrize("make", [as_paths, as_dataset])
def test_the_same_pixels_from_paths_datasets_and_images(make, files, processor):
    images = TaskImages([Task("art", ["x", "y"], train=make(files[:2]))], "train", processor.image_processor)
    expected = processor.image_processor(images=Image.open(files[1]), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(images[1]["pixel_values"], expected)
    assert images[1]["labels"] == 1


def test_items_say_their_task(tasks, processor):
    images = TaskImages(tasks, "train", processor.image_processor)
    assert images.sizes == [6, 10, 8]
    assert len(images) == 24
    assert [images[index]["task_ids"] for index in (0, 5, 6, 15, 16, 23)] == [0, 0, 1, 1, 2, 2]
    batch = collate([images[5], images[6]])
    assert batch["pixel_values"].shape == (2, 3, 48, 48)
    assert batch["labels"].tolist() == [2, 0]


def test_keeping_images_in_memory_changes_nothing(tasks, processor):
    kept = TaskImages(tasks, "train", processor.image_processor)
    fresh = TaskImages(tasks, "train", processor.image_processor, cache_bytes=0)
    for _ in range(2):
        assert torch.equal(kept[3]["pixel_values"], fresh[3]["pixel_values"])
    assert len(kept._cache) == 1
    assert not fresh._cache


@pytest.mark.parametrize("make", [as_paths, as_dataset])
def test_an_unreadable_image_is_refused_by_name(make, files, processor):
    images = TaskImages([Task("art", ["x", "y"], train=make(files))], "train", processor.image_processor)
    with pytest.raises(ValueError, match=r"Image .*2\.png of task 'art' cannot be read .* unreadable='skip'"):
        images[2]


@pytest.mark.parametrize("make", [as_paths, as_dataset])
def test_an_unreadable_image_is_skipped_by_choice_and_named(make, files, processor, caplog):
    task = Task("art", ["x", "y"], train=make(files))
    images = TaskImages([task], "train", processor.image_processor, unreadable="skip")
    with caplog.at_level(logging.WARNING):
        item = images[2]
    assert item["labels"] == IGNORED
    assert item["pixel_values"].shape == images[0]["pixel_values"].shape
    assert "2.png of task 'art' cannot be read" in caplog.text


def test_other_choices_stop_with_a_sentence(tasks, processor):
    with pytest.raises(ValueError, match="write 'refuse' or 'skip'"):
        TaskImages(tasks, "train", processor.image_processor, unreadable="ignore")

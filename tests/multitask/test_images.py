import logging
import os

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mmap_peft import Task
from mmap_peft.multitask.images import IGNORE_INDEX, TaskImages, collate


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


def test_keeping_images_changes_nothing(tasks, processor):
    kept = TaskImages(tasks, "train", processor.image_processor)
    fresh = TaskImages(tasks, "train", processor.image_processor, cache_bytes=0)
    for _ in range(2):
        for index in range(len(kept)):
            assert torch.equal(kept[index]["pixel_values"], fresh[index]["pixel_values"])
            assert kept[index]["labels"] == fresh[index]["labels"]


class Marked(os.PathLike):
    """A path that leaves a mark in a file whenever it is opened."""

    def __init__(self, path, marks):
        self.path, self.marks = path, marks

    def __fspath__(self):
        with open(self.marks, "a") as file:
            file.write(f"{self.path}\n")
        return self.path


@pytest.fixture
def marked(tmp_path, files):
    """Six images that leave marks, and what reads the marks."""
    marks = tmp_path / "marks"
    rows = [{"image": Marked(files[number % 2], marks), "label": number % 2} for number in range(6)]
    return Task("art", ["x", "y"], train=rows), lambda: len(marks.read_text().splitlines())


# Python 3.12 warns of any fork beside threads, which torch has
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_read_each_image_once_in_two_epochs(start, workers, marked, processor):
    task, count = marked
    images = TaskImages([task], "train", processor.image_processor)
    options = {"multiprocessing_context": start, "persistent_workers": start == "spawn"}
    loader = DataLoader(images, 2, shuffle=True, num_workers=workers, collate_fn=collate, **options)
    for _ in range(2):
        assert sorted(torch.cat([batch["labels"] for batch in loader]).tolist()) == [0, 0, 0, 1, 1, 1]
    found = [images[index]["pixel_values"] for index in range(6)]  # of what workers have kept
    assert count() == 6
    fresh = TaskImages([task], "train", processor.image_processor, cache_bytes=0)
    assert all(torch.equal(found[index], fresh[index]["pixel_values"]) for index in range(6))


def test_images_that_do_not_fit_are_read_again(marked, processor):
    task, count = marked
    images = TaskImages([task], "train", processor.image_processor, cache_bytes=4.5 * 3 * 48 * 48)
    for _ in range(2):
        for index in range(6):
            images[index]
    assert count() == 6 + 2


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
    assert item["labels"] == IGNORE_INDEX
    assert item["pixel_values"].shape == images[0]["pixel_values"].shape
    assert "2.png of task 'art' cannot be read" in caplog.text
    assert images[2]["labels"] == IGNORE_INDEX  # not taken for an image that was kept


def test_other_choices_stop_with_a_sentence(tasks, processor):
    with pytest.raises(ValueError, match="write 'refuse' or 'skip'"):
        TaskImages(tasks, "train", processor.image_processor, unreadable="ignore")

import multiprocessing
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser

from mmap_peft import MultiTaskTrainingArguments


def loading(args):
    return args.dataloader_num_workers, args.dataloader_persistent_workers, args.dataloader_pin_memory


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator, ten cores, workers that are forked, and memory to share."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=6e10))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(10)), raising=False)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "fork")


def test_without_an_accelerator_images_are_read_by_the_process_that_trains():
    assert loading(MultiTaskTrainingArguments()) == (0, False, False)
    assert loading(MultiTaskTrainingArguments(dataloader_num_workers=2)) == (2, True, False)


def test_with_an_accelerator_workers_read_them(accelerator, monkeypatch):
    assert loading(MultiTaskTrainingArguments()) == (8, True, True)
    assert loading(MultiTaskTrainingArguments(use_cpu=True)) == (0, False, False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert loading(MultiTaskTrainingArguments()) == (2, True, True)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "spawn")
    assert loading(MultiTaskTrainingArguments()) == (0, False, True)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="nothing that could be full")
def test_there_are_as_many_workers_as_have_room_for_their_batches(accelerator, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1e9))
    assert MultiTaskTrainingArguments().dataloader_num_workers == 2
    assert MultiTaskTrainingArguments(per_device_eval_batch_size=64).dataloader_num_workers == 5
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64e6))
    assert loading(MultiTaskTrainingArguments()) == (0, False, True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dataloader_num_workers", "0"], (0, False, True)),
        (["--dataloader_num_workers", "3", "--dataloader_persistent_workers", "False"], (3, False, True)),
        (["--dataloader_persistent_workers"], (8, True, True)),
        (["--dataloader_pin_memory", "False"], (8, True, False)),
    ],
)
def test_what_is_written_stands(accelerator, words, expected):
    assert loading(*HfArgumentParser(MultiTaskTrainingArguments).parse_args_into_dataclasses(words)) == expected


def test_a_cache_of_less_than_nothing_is_refused():
    with pytest.raises(
        ValueError, match="Invalid value -1 for `image_cache_gb`: expected a finite number of 0 or more"
    ):
        MultiTaskTrainingArguments(image_cache_gb=-1)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("snapshot_images", 0, "Invalid value 0 for `snapshot_images`: expected an integer of 1 or more"),
        ("max_groups", 0, "Invalid value 0 for `max_groups`: expected an integer of 1 or more"),
        ("grouping_steps", -1, "Invalid value -1 for `grouping_steps`: expected an integer of 0 or more"),
        ("sampling", "even", "sampling='even' is no choice; write one of uniform, proportional"),
        ("unreadable", "ignore", "unreadable='ignore' is no choice; write one of refuse, skip"),
    ],
)
def test_values_outside_of_their_range_are_refused(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        MultiTaskTrainingArguments(**{field: value})

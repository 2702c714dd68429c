from collections import Counter

import numpy as np
import pytest

from mmap_peft.multitask.sampler import TaskSampler, interleave


def tasks_of(indices, sizes):
    return np.searchsorted(np.cumsum(sizes), indices, side="right")


def test_shares_hold_after_any_number_of_rows():
    shares = np.array([0.5, 0.3, 0.2])
    order = interleave(shares, 1000)
    seen = np.cumsum(order[:, None] == np.arange(3), axis=0)
    assert np.abs(seen - shares * np.arange(1, 1001)[:, None]).max() <= 2


@pytest.mark.parametrize("sampling", ["uniform", "proportional"])
def test_every_batch_holds_every_task(sampling):
    sizes = [30, 25, 20]
    sampler = TaskSampler(sizes, 8, 2, sampling)
    indices = list(sampler)
    assert len(indices) == len(sampler) == 64  # whole steps of 16 out of 75
    for start in range(0, 64, 8):
        assert set(tasks_of(indices[start : start + 8], sizes)) == {0, 1, 2}


def test_proportional_sampling_shows_each_image_at_most_once_or_twice_an_epoch():
    sizes = [40, 20, 12]
    counts = Counter(TaskSampler(sizes, 8, 1, "proportional"))
    assert max(counts.values()) <= 2
    assert len(counts) >= 70


def test_uniform_sampling_repeats_small_tasks():
    sizes = [40, 20, 12]
    indices = list(TaskSampler(sizes, 6, 1, "uniform"))
    assert np.bincount(tasks_of(indices, sizes)).tolist() == [24, 24, 24]
    third = [index for index in indices if index >= 60]
    assert Counter(Counter(third).values()) == {2: 12}  # each of twelve images twice


@pytest.mark.parametrize("sampling", ["uniform", "proportional"])
def test_small_batches_are_pieces_of_large_ones(sampling):
    """One process with a batch of 16, two with 8, or four accumulated batches of 4 see the same images a step."""
    sizes = [24, 20, 20]
    whole = list(TaskSampler(sizes, 16, 1, sampling, seed=3))
    assert list(TaskSampler(sizes, 8, 2, sampling, seed=3)) == whole
    assert list(TaskSampler(sizes, 4, 4, sampling, seed=3)) == whole


def test_order_depends_on_seed_and_epoch_only():
    first, again, other = (TaskSampler([20, 20], 4, seed=seed) for seed in (1, 1, 2))
    assert list(first) == list(again)
    assert list(first) != list(other)
    first.set_epoch(1)
    later = list(first)
    assert later != list(again)
    first.set_epoch(0)
    assert list(first) == list(again)


@pytest.mark.parametrize(
    ("batch", "sampling", "sentence"),
    [
        (2, "uniform", "A batch of 2 images does not hold every one of 3 tasks"),
        (4, "proportional", "or choose sampling='uniform'"),
        (4, "balanced", "write 'uniform' or 'proportional'"),
    ],
)
def test_settings_that_leave_a_task_out_stop_with_a_sentence(batch, sampling, sentence):
    with pytest.raises(ValueError, match=sentence):
        TaskSampler([100, 100, 2], batch, 1, sampling)


@pytest.mark.parametrize("sampling", ["uniform", "proportional"])
def test_a_task_without_images_takes_no_part(sampling):
    assert sorted(TaskSampler([3, 0, 3], 2, sampling=sampling)) == [0, 1, 2, 3, 4, 5]

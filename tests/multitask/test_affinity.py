import re

import numpy as np
import pytest
import torch
from transformers.utils.logging import tqdm

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, TaskGrouping
from mmap_peft.multitask import grouping_stage
from mmap_peft.multitask.affinity import (
    AFFINITIES,
    Snapshot,
    adjusted_rand_index,
    affinity_matrix,
    from_tensors,
    mean_affinity,
    reliability,
    separation,
    snapshot_steps,
    to_tensors,
)
from mmap_peft.multitask.task_gradients import task_gradients


FAMILIES = np.array([0, 0, 0, 0, 1, 1, 1, 1])
TASKS = [f"task {number}" for number in range(8)]


def snapshots(families=FAMILIES, signal=1.0, noise=1.0, agree=0.0, count=5, parts=4, seed=0, elements=200):
    """Gradients of tasks: a direction of their family and one of all tasks (`agree`), and noise of each part."""
    rng, names = np.random.default_rng(seed), [f"task {number}" for number in range(len(families))]
    ways, common = rng.normal(size=(max(families) + 1, elements)), rng.normal(size=elements)
    made = []
    for step in range(1, count + 1):
        gradients = signal * ways[families][:, None] + agree * common
        gradients = gradients + noise * rng.normal(size=(len(families), parts, elements))
        losses = torch.from_numpy(rng.uniform(0.5, 2, size=(len(families), parts)))
        made.append(Snapshot.of(step, torch.from_numpy(gradients), losses, names))
    return made


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_planted_families_are_found_and_stable(affinity, seed):
    found = TaskGrouping.from_gradients(TASKS, snapshots(agree=0.5, seed=seed), affinity, seed=seed)
    assert found.group_numbers.tolist() == FAMILIES.tolist()
    assert found.is_stable and found.remarks == []
    assert found.together[:4, :4].min() > 0.9 > 0.1 > found.together[:4, 4:].max()


def test_tensors_of_snapshots_lose_no_bit():
    made = snapshots(parts=3, count=12)
    again = from_tensors(dict(reversed(to_tensors(made).items())))
    assert [each.step for each in again] == list(range(1, 13))
    for one, other in zip(again, made, strict=True):
        for name in ("products", "scaled", "losses"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("unstable", ["all", "none", "keep"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noise_is_said_to_have_no_groups(unstable, seed):
    made = snapshots(signal=0.0, agree=0.3, seed=seed)
    found = TaskGrouping.from_gradients(TASKS, made, "directions", unstable=unstable, seed=seed)
    assert not found.is_stable and found.stability < 0.7
    kept = TaskGrouping.from_similarity(TASKS, found.snapshots).groups
    assert found.groups == {"all": [TASKS], "none": [[task] for task in TASKS], "keep": kept}[unstable]
    [remark] = found.remarks
    assert "No stable groups (stability" in remark
    assert {"all": "one group is used", "none": "a group of its own", "keep": "are kept"}[unstable] in remark


def test_separation_is_the_difference_in_units_of_the_reliability():
    similarity = np.array([[1, 0.6, 0.1], [0.6, 1, 0.2], [0.1, 0.2, 1]])
    assert separation(similarity, np.array([0, 0, 1]), np.full(3, 1.0)) == pytest.approx(0.45)
    # halves of the images agree at 1/3, so all of them at 1/2
    assert separation(similarity, np.array([0, 0, 1]), np.full(3, 1 / 3)) == pytest.approx(0.9)
    assert separation(similarity, np.array([0, 1, 2]), np.ones(3)) is None
    for factor in 0.01, 100:  # lookahead has a unit
        assert separation(factor * similarity, np.array([0, 0, 1]), np.full(3, factor)) == pytest.approx(0.45)
    assert separation(similarity, np.zeros(3), np.ones(3)) is None
    assert np.isfinite(separation(similarity, np.array([0, 0, 1]), np.zeros(3)))


def test_groups_that_hardly_differ_are_not_used_although_they_are_stable():
    """Gradients almost without noise: the groups are found each time, but most of what tasks want is the same."""
    made = snapshots(signal=0.2, agree=1.0, noise=0.05)
    found = TaskGrouping.from_gradients(TASKS, made, "cosine")
    assert found.stability > 0.9 and found.separation < 0.2
    assert found.groups == [TASKS]
    assert re.search(r"^No stable groups \(separation 0\.\d\d is below 0\.5\): one group is used\.$", found.remarks[0])


def test_reliability_is_high_where_images_agree_and_zero_for_noise():
    made = snapshots(noise=0.5)
    for affinity in "cosine", "early", "directions":
        assert reliability(made, affinity).min() > 0.7
        assert np.abs(reliability(snapshots(signal=0.0), affinity)).max() < 0.2
    assert reliability(made, "lookahead").min() > 0


def test_a_task_with_one_image_has_no_reliability_and_is_resampled_all_the_same():
    made = []
    for step in range(1, 4):
        rng = np.random.default_rng(step)
        gradients, losses = rng.normal(size=(3, 4, 50)), rng.uniform(1, 2, size=(3, 4))
        gradients[1, 1:], losses[1, 1:] = 0, 0
        made.append(Snapshot.of(step, torch.from_numpy(gradients), torch.from_numpy(losses), list("xyz")))
    for affinity in AFFINITIES:
        found = TaskGrouping.from_gradients(list("xyz"), made, affinity)
        assert found.reliability[1] == 0 and np.isfinite(found.similarity).all() and found.together.min() >= 0


def test_cosines_are_those_of_whole_gradients():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 3, 50, dtype=torch.float64, generator=generator)
    losses = torch.rand(4, 3, dtype=torch.float64, generator=generator) + 0.5
    made, whole = Snapshot.of(1, gradients, losses, list("wxyz")), gradients.sum(dim=1)
    expected = torch.nn.functional.cosine_similarity(whole[:, None], whole[None], dim=-1).numpy()
    np.testing.assert_allclose(affinity_matrix(made, "cosine"), expected, atol=1e-12)
    # Adam's directions do not change when elements of the gradient are scaled, or a whole task is.
    scales = torch.rand(50, dtype=torch.float64, generator=generator) + 0.5
    scaled = Snapshot.of(1, gradients * scales, losses, list("wxyz"))
    found = affinity_matrix(made, "directions")
    np.testing.assert_allclose(affinity_matrix(scaled, "directions"), found, atol=1e-2)
    assert np.abs(affinity_matrix(scaled, "cosine") - expected).max() > 1e-2
    for affinity in AFFINITIES:
        order = [2, 0, 3, 1]
        shuffled = Snapshot.of(1, gradients[order], losses[order], list("wxyz"))
        matrix = affinity_matrix(made, affinity)
        np.testing.assert_allclose(affinity_matrix(shuffled, affinity), matrix[np.ix_(order, order)], atol=1e-12)
        np.testing.assert_array_equal(matrix, matrix.T)


def test_lookahead_is_the_share_of_the_loss_that_a_small_step_saves(clip, processor, tasks, arguments):
    classifier = MultiTaskClassifier(clip, processor, tasks, MmAPConfig(source_shape=(2, 4), init_std=0.1))
    stage = MultiTaskTrainer(model=classifier, args=arguments(snapshot_images=8)).shared_adapter_trainer()
    rows = np.concatenate(stage._chosen_images())

    def measured():
        gradients, losses = task_gradients(classifier, "global", stage._batches(rows))
        return gradients, losses

    gradients, losses = measured()
    made = Snapshot.of(0, gradients[:, None], losses[:, None], list(classifier.tasks))
    length, saved = 1e-3, np.zeros((len(losses), len(losses)))
    parameters = list(classifier.adapter_parameters("global").values())
    for task, gradient in enumerate(gradients):
        step = length * gradient / gradient.norm()
        parts = step.split([parameter.numel() for parameter in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts):
                parameter.sub_(part.view_as(parameter).float())
            saved[task] = ((losses - measured()[1]) / losses / length).numpy()
            for parameter, part in zip(parameters, parts):
                parameter.add_(part.view_as(parameter).float())
    np.testing.assert_allclose(affinity_matrix(made, "lookahead"), (saved + saved.T) / 2, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize(
    ("affinity", "steps", "count", "expected"),
    [
        ("cosine", 100, 5, [20, 40, 60, 80, 100]),
        ("lookahead", 7, 2, [4, 7]),
        ("early", 100, 5, [4, 8, 12, 16, 20]),
        ("early", 3, 3, [1]),
        ("directions", 100, 5, [1, 3, 10, 32, 100]),
        ("directions", 100, 1, [100]),
        ("directions", 2, 2, [1, 2]),
        ("directions", 1, 1, [1]),
    ],
)
def test_steps_of_snapshots(affinity, steps, count, expected):
    assert snapshot_steps(affinity, steps, count) == expected


def test_the_adjusted_rand_index():
    assert adjusted_rand_index([0, 0, 1, 1], [5, 5, 3, 3]) == 1
    assert adjusted_rand_index([0, 0, 0], [0, 0, 0]) == adjusted_rand_index([0, 1, 2], [2, 1, 0]) == 1
    assert adjusted_rand_index([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)
    assert adjusted_rand_index([0, 0, 1, 2], [0, 0, 1, 1]) == pytest.approx(0.5714285714285715)  # scikit-learn's
    rng = np.random.default_rng(0)
    assert (
        abs(np.mean([adjusted_rand_index(rng.integers(3, size=9), FAMILIES.tolist() + [1]) for _ in range(500)]))
        < 0.03
    )


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_task_without_a_direction_stops_with_its_name(value):
    gradients = torch.ones(2, 1, 3, dtype=torch.float64)
    gradients[1] = value
    with pytest.raises(ValueError, match="gradient of task 'y' has the norm"):
        Snapshot.of(1, gradients, torch.ones(2, 1), ["x", "y"])


def test_fewer_images_than_parts(clip, processor, tasks, arguments):
    classifier = MultiTaskClassifier(clip, processor, tasks, MmAPConfig(source_shape=(2, 4), init_std=0.1))
    stage = MultiTaskTrainer(model=classifier, args=arguments(snapshot_images=1)).shared_adapter_trainer()
    assert stage.snapshot().has_images.sum(axis=1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("hidden", [True, False])
def test_the_bootstrap_shows_its_progress(hidden, monkeypatch, capsys):
    at_once = {"delay": 0, "mininterval": 0}
    shown = "mmap_peft.multitask.affinity.tqdm"
    monkeypatch.setattr(shown, lambda each, **options: tqdm(each, **{**options, **at_once}))
    TaskGrouping.from_gradients(TASKS, snapshots(), "directions", disable_tqdm=hidden)
    assert ("Stability of groups" in capsys.readouterr().err) != hidden


def test_no_snapshots_stop_with_a_sentence():
    with pytest.raises(ValueError, match="no snapshots of gradients to group the tasks by"):
        TaskGrouping.from_gradients(TASKS, [], "directions")


def test_tasks_that_all_conflict_stay_apart():
    rng, made = np.random.default_rng(0), []
    for step in range(1, 6):
        ways = np.eye(4) - 0.25
        gradients = torch.from_numpy(np.repeat(ways[:, None], 4, axis=1) + 0.02 * rng.normal(size=(4, 4, 4)))
        made.append(Snapshot.of(step, gradients, torch.ones(4, 4), TASKS[:4]))
    found = TaskGrouping.from_gradients(TASKS[:4], made, "cosine", threshold=0.2)
    assert found.is_stable and found.groups == [[task] for task in TASKS[:4]]


def test_many_tasks_are_compared_some_at_a_time_with_the_same_result(clip, processor, tasks, arguments, monkeypatch):
    classifier = MultiTaskClassifier(clip, processor, tasks, MmAPConfig(source_shape=(2, 4), init_std=0.1))
    stage = MultiTaskTrainer(model=classifier, args=arguments(snapshot_images=8)).shared_adapter_trainer()
    together = stage.snapshot()
    sizes = []
    monkeypatch.setattr(grouping_stage, "TASKS_AT_ONCE", 1)
    monkeypatch.setattr(
        grouping_stage, "task_gradients", lambda *args: sizes.append(len(args[3])) or task_gradients(*args)
    )
    apart = stage.snapshot()
    assert set(sizes) == {1} and len(sizes) == 4 * len(tasks)
    for affinity in AFFINITIES:
        found, expected = (mean_affinity([each], affinity) for each in (apart, together))
        np.testing.assert_allclose(found, expected, atol=1e-4)
    monkeypatch.setattr(grouping_stage, "MOST_ELEMENTS", 20)
    assert stage.snapshot().products.shape == together.products.shape

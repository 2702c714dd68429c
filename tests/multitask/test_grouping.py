import numpy as np
import pytest
from PIL import Image

from mmap_peft import TaskGrouping, plot_grouping
from mmap_peft.multitask.clustering import correlation_clustering
from mmap_peft.multitask.files import write_json


def partitions(items):
    """All partitions of a list."""
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for number, group in enumerate(smaller):
            yield [*smaller[:number], [first, *group], *smaller[number + 1 :]]


def gain(gains, groups):
    return sum(gains[i, j] for group in groups for i in group for j in group if i < j)


def symmetric(count, seed):
    matrix = np.random.default_rng(seed).uniform(-1, 1, (count, count))
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 1)
    return matrix


@pytest.mark.parametrize("max_groups", [None, 2, 3])
@pytest.mark.parametrize("count", range(1, 9))
def test_equals_the_best_of_all_partitions(count, max_groups):
    for seed in range(3):
        gains = symmetric(count, seed)
        found = correlation_clustering(gains, max_groups).groups
        assert sorted(member for group in found for member in group) == list(range(count))
        allowed = [
            groups for groups in partitions(list(range(count))) if max_groups is None or len(groups) <= max_groups
        ]
        assert gain(gains, found) == pytest.approx(max(gain(gains, groups) for groups in allowed), abs=1e-6)
        assert max_groups is None or len(found) <= max_groups


def planted(count, groups, noise, seed=0):
    rng = np.random.default_rng(seed)
    truth, errors = rng.integers(0, groups, count), rng.normal(0, noise, (count, count))
    return truth, np.where(truth[:, None] == truth, 0.3, -0.3) + (errors + errors.T) / 2


@pytest.mark.parametrize(("count", "groups"), [(20, 3), (60, 8), (200, 25), (600, 30)])
def test_planted_groups_of_many_tasks_are_found(count, groups):
    truth, gains = planted(count, groups, 0.1)
    found = correlation_clustering(gains)
    assert {frozenset(group) for group in found.groups} == {
        frozenset(np.flatnonzero(truth == group).tolist()) for group in np.unique(truth)
    }
    assert found.value == pytest.approx(gain(gains, found.groups))
    assert found.gap == 0 or count > 250


@pytest.mark.parametrize("max_groups", [None, 4])
@pytest.mark.parametrize("seconds", [0, 1])
def test_what_is_found_in_time_is_a_partition_with_a_bound(seconds, max_groups):
    gains = symmetric(40, 0)
    found = correlation_clustering(gains, max_groups, seconds)
    assert sorted(member for group in found.groups for member in group) == list(range(40))
    assert found.value == pytest.approx(gain(gains, found.groups))
    assert found.value < found.bound
    assert 0 < found.gap < 1
    assert max_groups is None or len(found.groups) <= max_groups
    assert seconds or found.value <= correlation_clustering(gains, max_groups, 1).value


def test_groups_that_were_not_shown_to_be_the_best_have_a_gap_though_no_pair_gains():
    gains = -np.ones((8, 8))
    assert correlation_clustering(gains, 2, seconds=0).gap > 0
    assert correlation_clustering(gains, 2).gap == 0


@pytest.mark.parametrize("seed", range(5))
def test_permuting_tasks_permutes_the_answer(seed):
    names = [f"task {number}" for number in range(7)]
    similarity = symmetric(7, seed)
    order = np.random.default_rng(seed + 100).permutation(7)
    one = TaskGrouping.from_similarity(names, similarity[None])
    other = TaskGrouping.from_similarity([names[i] for i in order], similarity[np.ix_(order, order)][None])
    assert {frozenset(group) for group in one.groups} == {frozenset(group) for group in other.groups}


def test_planted_groups_are_found():
    truth = np.array([0, 1, 0, 2, 1, 2, 0, 1])
    noise = np.random.default_rng(0).normal(0, 0.1, (5, 8, 8))
    similarity = 0.3 + 0.4 * (truth[:, None] == truth) + (noise + noise.transpose(0, 2, 1)) / 2
    names = [f"{number}" for number in range(8)]
    for threshold in ("mean", 0.5):
        grouping = TaskGrouping.from_similarity(names, similarity, threshold)
        assert {frozenset(group) for group in grouping.groups} == {
            frozenset(names[task] for task in np.flatnonzero(truth == group)) for group in range(3)
        }


def test_a_positive_affinity_alone_does_not_make_one_group():
    similarity = np.full((4, 4), 0.8)
    similarity[:2, :2] = similarity[2:, 2:] = 0.9
    assert TaskGrouping.from_similarity(list("wxyz"), similarity[None]).groups == [["w", "x"], ["y", "z"]]
    assert TaskGrouping.from_similarity(list("wxyz"), similarity[None], 0.5).groups == [["w", "x", "y", "z"]]
    assert TaskGrouping.from_similarity(list("wxyz"), similarity[None], 0.95).groups == [["w"], ["x"], ["y"], ["z"]]


def test_a_pair_without_gain_stays_apart():
    assert TaskGrouping.from_similarity(["x", "y"], np.full((1, 2, 2), 0.5)).groups == [["x"], ["y"]]


def test_modes_to_compare_with():
    names = list("vwxyz")
    assert TaskGrouping.by_mode("all", names).groups == [names]
    assert TaskGrouping.by_mode("none", names).groups == [[name] for name in names]
    assert TaskGrouping.by_mode("given", names, [["v", "z"], ["w", "x", "y"]]).groups == [["v", "z"], ["w", "x", "y"]]
    chances = [TaskGrouping.by_mode("random", names, max_groups=2, seed=seed).groups for seed in range(20)]
    assert all(sorted(map(len, groups)) == [2, 3] for groups in chances)
    assert len({str(groups) for groups in chances}) > 5
    assert chances[3] == TaskGrouping.by_mode("random", names, max_groups=2, seed=3).groups


@pytest.mark.parametrize("groups", [[["x"]], [["x", "y"], ["y"]], [["x", "y"], []], [["x", "z"]]])
def test_no_partition_stops_with_a_sentence(groups):
    with pytest.raises(ValueError, match="are no partition of the tasks"):
        TaskGrouping(["x", "y"], groups)


def test_unknown_and_incomplete_modes_stop_with_a_sentence():
    with pytest.raises(ValueError, match="write one of gradient, all"):
        TaskGrouping.by_mode("best", ["x", "y"])
    with pytest.raises(ValueError, match="needs the groups"):
        TaskGrouping.by_mode("given", ["x", "y"])


def test_many_tasks_are_saved_and_read_again(tmp_path):
    """The matrices of 1000 tasks would be more JSON than is read."""
    count, rng = 1000, np.random.default_rng(0)
    names, snapshots = [f"task {number}" for number in range(count)], rng.uniform(-1, 1, (3, count, count))
    measured = {"reliability": rng.random(count), "together": rng.random((count, count)), "stability": 0.5}
    grouping = TaskGrouping(names, [names], snapshots.mean(0), snapshots, [1, 2, 3], **measured)
    grouping.save(tmp_path / "grouping.json")
    again = TaskGrouping.load(tmp_path / "grouping.json")
    for name, value in vars(grouping).items():
        assert np.array_equal(getattr(again, name), value), name
    assert {path.name for path in tmp_path.iterdir()} == {"grouping.json", "grouping.json.safetensors"}
    assert (tmp_path / "grouping.json").stat().st_size < 100_000


def test_a_file_of_an_early_version_has_the_matrices_as_json(tmp_path):
    grouping = TaskGrouping.from_similarity(list("xy"), np.eye(2)[None])
    write_json(grouping.to_dict(), tmp_path / "grouping.json")
    assert TaskGrouping.load(tmp_path / "grouping.json").to_dict() == grouping.to_dict()


@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_matrices_of_another_saving_are_refused(damage, tmp_path):
    path, matrices = tmp_path / "grouping.json", tmp_path / "grouping.json.safetensors"
    TaskGrouping.from_similarity(list("xy"), np.eye(2)[None]).save(path)
    content = matrices.read_bytes()
    TaskGrouping.from_similarity(list("xy"), np.ones((1, 2, 2))).save(path)
    {
        "cut": lambda: matrices.write_bytes(matrices.read_bytes()[:-8]),
        "missing": matrices.unlink,
        "other": lambda: matrices.write_bytes(content),
    }[damage]()
    with pytest.raises(ValueError, match=r"grouping\.json holds no grouping .*safetensors is missing, damaged"):
        TaskGrouping.load(path)


def test_json_keeps_every_bit(tmp_path):
    snapshots = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4))
    grouping = TaskGrouping.from_similarity(list("wxyz"), snapshots, 0.1, steps=[10, 20, 30])
    grouping.save(tmp_path / "grouping.json")
    again = TaskGrouping.load(tmp_path / "grouping.json")
    assert np.array_equal(again.similarity, grouping.similarity)
    assert np.array_equal(again.snapshots, snapshots)
    assert (again.groups, again.steps, again.threshold, again.mode) == (
        grouping.groups,
        [10, 20, 30],
        0.1,
        "gradient",
    )
    np.testing.assert_allclose(again.spread, snapshots.std(axis=0))


@pytest.mark.parametrize("affinity", ["directions", "lookahead", None])
@pytest.mark.parametrize("count", [1, 2, 3, 13, 64])
def test_the_picture_of_many_tasks_has_few_labels(count, affinity, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    names, similarity = [f"task {number}" for number in range(count)], symmetric(count, 0)
    grouping = TaskGrouping.from_similarity(names, similarity[None], seconds=1)
    grouping.affinity = affinity
    if affinity:
        grouping.reliability, grouping.stability = np.linspace(0, 1, count), 0.9
    plot_grouping(grouping, tmp_path / "picture.png")
    heat_map = drawn[0].axes[0]
    labels = [label.get_text() for label in heat_map.get_yticklabels()]
    assert len(labels) == -(-count // -(-count // 32)) and set(labels) <= set(names)
    assert len(heat_map.patches) == len(grouping.groups)
    assert len(heat_map.texts) == (count**2 if count <= 12 else 0)
    shown = heat_map.images[0].get_array()
    order = [names.index(label) for label in labels] if count <= 32 else None
    if affinity and order:
        np.testing.assert_allclose(np.diag(shown), grouping.reliability[order])
    place = {name: row for row, name in enumerate(labels)}
    for group in grouping.groups if order else ():  # each group is one block
        rows = sorted(place[task] for task in group)
        assert rows == list(range(rows[0], rows[-1] + 1))


def test_the_picture_is_drawn(tmp_path):
    snapshots = np.stack([symmetric(4, seed) for seed in range(2)])
    path = tmp_path / "grouping.png"
    plot_grouping(TaskGrouping.from_similarity(["art", "clipart", "product", "real world"], snapshots), path)
    picture = Image.open(path)
    assert min(picture.size) > 300
    assert len(picture.convert("RGB").getcolors(2**20)) > 100
    with pytest.raises(ValueError, match="has no similarities to draw"):
        plot_grouping(TaskGrouping.by_mode("all", ["x", "y"]), path)

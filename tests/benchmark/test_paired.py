"""The paired bootstrap: against exact probabilities, against drawing image by image, and its coverage."""

import itertools
from statistics import harmonic_mean

import numpy as np
import pytest
from scipy import stats

from benchmark import paired
from benchmark.experiment import Experiment
from benchmark.paired import compare, mcnemar, pack, paired_bootstrap, paired_images
from benchmark.summary import Row, gain, interval


def result(right, split="s", **fields):
    """A result of tasks, given by which of their images are right."""
    accuracy = {task: float(np.mean(values)) for task, values in right.items()}
    bits = {task: pack(np.array(values, dtype=bool)) for task, values in right.items()}
    return {
        "accuracy": accuracy,
        "mean": float(np.mean(list(accuracy.values()))),
        "correct": bits,
        "split": split,
        "settings": {},
        **fields,
    }


def pairs(differences):
    """Images that only the first method (1), only the other (-1) or neither has right, for each seed by task."""
    return [{task: np.array([each > 0, each < 0]) for task, each in one.items()} for one in differences]


def row(name, *results):
    return Row(Experiment(name, "mmap"), dict(enumerate(results)))


@pytest.mark.parametrize("size", [1, 5, 7, 8, 9, 16, 23])
def test_bits_tell_how_many_images_there_are(size):
    rng = np.random.default_rng(size)
    for right in (rng.random(size) < 0.5, np.ones(size, dtype=bool), np.zeros(size, dtype=bool)):
        other = np.ones(size, dtype=bool)
        found = paired_images(result({"a": right}), result({"a": other}))["a"]
        assert found.tolist() == [right.tolist(), other.tolist()]


def test_draws_have_the_exact_probabilities():
    values = np.array([1, 1, 0, -1], dtype=np.int8)
    sums = [sum(drawn) for drawn in itertools.product(values, repeat=4)]
    exact = {level: np.quantile(np.array(sums) / 4, level, method="inverted_cdf") for level in (0.025, 0.975)}
    found = paired_bootstrap(pairs([{"a": values}]), [0], draws=200_000)
    assert (found.low, found.high) == (exact[0.025], exact[0.975])
    share = np.mean(np.array(sums) <= 0)
    assert found.p == pytest.approx(2 * share, abs=5 * 2 * np.sqrt(share * (1 - share) / 200_000))
    assert found.mean == 0.25 and found.seeds == 1


def plain(differences, same_images, draws):
    """The bootstrap image by image."""
    rng, count = np.random.default_rng(1), len(differences)
    means = [np.mean([values.mean() for values in one.values()]) for one in differences]
    drawn = []
    for _ in range(draws):
        seeds = np.std(means, ddof=1) / np.sqrt(count) * rng.standard_t(count - 1)
        rows = {task: rng.integers(len(values), size=len(values)) for task, values in differences[0].items()}
        images = []
        for one in differences:
            if not same_images:
                rows = {task: rng.integers(len(values), size=len(values)) for task, values in one.items()}
            images.append(np.mean([one[task][rows[task]].mean() for task in one]))
        drawn.append(seeds + np.mean(images))
    return np.array(drawn)


@pytest.mark.parametrize("same_images", [True, False])
def test_drawing_counts_equals_drawing_images(same_images):
    rng = np.random.default_rng(0)
    shift = rng.integers(-1, 2, 40)  # the same in all seeds
    differences = [
        {"a": np.where(rng.random(40) < 0.7, shift, 1).astype(np.int8), "b": rng.integers(-1, 2, 25).astype(np.int8)}
        for _ in range(3)
    ]
    slow = plain(differences, same_images, 4000)
    fast = paired_bootstrap(pairs(differences), [0, 0, 0] if same_images else [0, 1, 2], draws=100_000)
    assert np.quantile(slow, [0.025, 0.975]) == pytest.approx([fast.low, fast.high], abs=0.1 * (fast.high - fast.low))
    assert np.median(slow) == pytest.approx(fast.mean, abs=0.02 * (fast.high - fast.low))


def test_images_that_all_seeds_share_are_drawn_together():
    values = np.tile([1, 1, -1], 100).astype(np.int8)
    one = paired_bootstrap(pairs([{"a": values}]), [0])
    together = paired_bootstrap(pairs(3 * [{"a": values}]), [0, 0, 0])
    apart = paired_bootstrap(pairs(3 * [{"a": values}]), [0, 1, 2])
    assert together.high - together.low == pytest.approx(one.high - one.low, rel=0.05)
    assert apart.high - apart.low == pytest.approx((one.high - one.low) / np.sqrt(3), rel=0.05)


@pytest.mark.parametrize("rates", [(10_000, 12_000, 17_000), (2_000, -1_000, 3_000, 7_000)])
def test_seeds_that_differ_give_students_interval_and_p(rates):
    many = [np.repeat([np.sign(rate), 0], [abs(rate), 100_000 - abs(rate)]).astype(np.int8) for rate in rates]
    found = paired_bootstrap(pairs([{"a": values} for values in many]), list(rates))
    means = [rate / 1e5 for rate in rates]
    assert (found.high - found.low) / 2 == pytest.approx(interval(means), rel=0.1)
    assert found.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue, abs=0.02)
    assert found.holds == (found.p < 0.05)


@pytest.mark.parametrize("of_seeds", [0.0, 0.02, 0.1])
def test_the_interval_holds_the_true_difference(of_seeds):
    """Two methods that are equally good: the mean of images' differences varies over seeds by `of_seeds`."""
    rng, held, trials = np.random.default_rng(2), 0, 300
    for _ in range(trials):
        differences = []
        for shift in rng.normal(0, of_seeds, 3):
            draw = rng.random((2, 500))
            differences.append({"a": (draw[0] < 0.5 + shift).astype(np.int8) - (draw[1] < 0.5)})
        found = paired_bootstrap(pairs(differences), [0, 1, 2], draws=1000, seed=int(rng.integers(2**31)))
        held += found.low <= 0 <= found.high
    assert held / trials > 0.93


def test_rows_are_compared_on_the_seeds_that_both_have():
    rng = np.random.default_rng(3)
    rights = rng.random((4, 2, 50)) < 0.6
    one = row("one", *(result({"a": a, "b": b}) for a, b in rights[:, :, :]))
    other = row("other", *(result({"a": b, "b": a}) for a, b in rights[:3]))
    other.results[2].pop("correct")  # as older lines
    found = compare(one, other)
    assert found.seeds == 2
    del other.results[2]
    assert found.mean == pytest.approx(gain(one, other))
    assert found == compare(one, other)  # the same seed, the same result
    back = compare(other, one)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=0.02)
    other.results = {7: other.results[0]}
    assert compare(one, other) is None
    other.results = {0: result({"a": rights[0, 0]}, split="another")}
    with pytest.raises(ValueError, match="for seed 0 are of different images"):
        compare(one, other)


def test_a_method_does_not_differ_from_itself():
    one = row("one", result({"a": [1, 0, 1]}), result({"a": [0, 0, 1]}))
    found = compare(one, one)
    assert (found.mean, found.low, found.high, found.p, found.holds) == (0, 0, 0, 1, False)


def test_mcnemar():
    one = row("one", result({"a": [1] * 9 + [0] * 1 + [1] * 5}))
    other = row("other", result({"a": [0] * 9 + [1] * 1 + [1] * 5}))
    assert mcnemar(one, other) == pytest.approx(0.021484375)  # 9 of 10 by a fair coin, on both sides
    assert mcnemar(one, one) == 1


@pytest.mark.parametrize("same_images", [True, False])
def test_base_to_new_compares_harmonic_means(same_images):
    """Against drawing image by image; the plain mean of all rows would say that the other method is better."""
    rng = np.random.default_rng(5)
    rates = {"a_base": (0.8, 0.99), "b_base": (0.75, 0.99), "a_new": (0.5, 0.35), "b_new": (0.6, 0.4)}
    drawn = {task: rng.random((3, 2, 30 + 10 * number)) for number, task in enumerate(rates)}
    pairs = [{task: drawn[task][seed] < np.array([rates[task]]).T for task in rates} for seed in range(3)]

    def statistic(one):
        accuracy = {task: right.mean(axis=1) for task, right in one.items()}
        base, new = ([accuracy[name + half] for name in "ab"] for half in ("_base", "_new"))
        return np.subtract(*(harmonic_mean([np.mean(base, 0)[way], np.mean(new, 0)[way]]) for way in (0, 1)))

    each = [statistic(one) for one in pairs]
    slow = []
    for _ in range(1500):
        rows = [
            {task: rng.integers(right.shape[1], size=right.shape[1]) for task, right in one.items()} for one in pairs
        ]
        rows = 3 * rows[:1] if same_images else rows
        images = [
            statistic({task: right[:, its[task]] for task, right in one.items()}) for one, its in zip(pairs, rows)
        ]
        slow.append(np.mean(images) + np.std(each, ddof=1) / np.sqrt(3) * rng.standard_t(2))
    fast = paired_bootstrap(pairs, [0, 0, 0] if same_images else [0, 1, 2], "base_to_new", draws=50_000)
    assert fast.mean == pytest.approx(np.mean(each)) and fast.mean > 0
    assert np.quantile(slow, [0.025, 0.975]) == pytest.approx([fast.low, fast.high], abs=0.1 * (fast.high - fast.low))
    assert paired_bootstrap(pairs, [0, 0, 0] if same_images else [0, 1, 2]).mean < 0


def test_rows_are_compared_by_what_their_protocol_reports():
    base, worse = [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]
    settings = {protocol: {"protocol": protocol} for protocol in ("base_to_new", "forgetting", "cross_dataset")}
    for protocol, expected in (("base_to_new", 0.8 - 8 / 15), ("forgetting", 0.4), ("cross_dataset", 0.2)):
        names = ("a_base", "a_new") if protocol == "base_to_new" else ("a_base", "a")
        one, other = ({names[0]: base, names[1]: values} for values in (base, worse))
        rows = [row(protocol, result(each, settings=settings[protocol])) for each in (one, other)]
        assert compare(*rows).mean == pytest.approx(expected)
        assert mcnemar(*rows) == 0.5


def test_no_image_is_right():
    nothing = {"a_base": np.zeros((2, 4), dtype=bool), "a_new": np.ones((2, 4), dtype=bool)}
    assert paired_bootstrap([nothing], [0], "base_to_new") == paired_bootstrap([nothing], [0])


def test_many_patterns_are_drawn_in_parts(monkeypatch):
    rng = np.random.default_rng(6)
    right = [{name: rng.random((2, 40)) < 0.5 for name in ("a_base", "a_new")} for _ in range(4)]
    whole = paired_bootstrap(right, [0] * 4, "base_to_new", draws=500)
    monkeypatch.setattr(paired, "MOST_AT_ONCE", 1000)
    assert paired_bootstrap(right, [0] * 4, "base_to_new", draws=500) == whole

"""Affinity of tasks: how much their gradients with respect to shared prompts agree, and how reliable this is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils.logging import tqdm


AFFINITIES = ("cosine", "early", "lookahead", "directions")
EARLY = 0.2  # share of stage 1 in which the loss falls fastest
MOST_ELEMENTS = 2**16  # of a gradient; of larger ones a random part is compared, to bound memory
LEAST_RELIABILITY = 0.1  # less is noise, and no unit
EPSILON = 1e-3  # of the root mean square of all elements, so that elements with hardly any gradient do not count


@dataclass
class Snapshot:
    """Inner products of the tasks' gradients at one training step, each from several disjoint parts of its images.

    Args:
        step (`int`): the training step.
        products (`np.ndarray`): (tasks, parts, tasks, parts), inner products of the gradients.
        scaled (`np.ndarray`): the same of the gradients that are scaled similar to Adam's: each element is divided by
            its root mean square over tasks and parts.
        losses (`np.ndarray`): (tasks, parts), the losses. They and the gradients are sums over the images of a part,
            divided by the number of the task's images.
    """

    step: int
    products: np.ndarray
    scaled: np.ndarray
    losses: np.ndarray

    @classmethod
    def of(cls, step: int, gradients: torch.Tensor, losses: torch.Tensor, tasks: Sequence[str]) -> Snapshot:
        """Make a snapshot of gradients, (tasks, parts, elements), and losses, (tasks, parts).

        Raises:
            ValueError: a task's gradient is zero or not finite, so that it has no direction.
        """
        for name, norm in zip(tasks, gradients.sum(dim=1).norm(dim=1).tolist()):
            if not 0 < norm < float("inf"):
                raise ValueError(
                    f"The gradient of task {name!r} has the norm {norm}, so its similarity to other tasks is unknown; "
                    "see that it has training images, that its prompts are trained, and that its loss is finite."
                )
        flat = gradients.flatten(0, 1).double()
        size = flat.square().mean(dim=0).sqrt()
        scaled = flat / (size + EPSILON * size.square().mean().sqrt())
        shape = losses.shape * 2
        products = [(each @ each.T).reshape(shape).cpu().numpy() for each in (flat, scaled)]
        return cls(step, *products, losses.double().cpu().numpy())

    @property
    def has_images(self) -> np.ndarray:
        """(tasks, parts), whether a part has images."""
        return np.einsum("ipip->ip", self.products) > 0


def to_tensors(snapshots: Sequence[Snapshot]) -> dict[str, torch.Tensor]:
    """All fields of snapshots, without loss of precision: `from_tensors` is the inverse."""
    fields = ("products", "scaled", "losses")
    return {f"{each.step}.{name}": torch.from_numpy(getattr(each, name)) for each in snapshots for name in fields}


def from_tensors(tensors: dict[str, torch.Tensor]) -> list[Snapshot]:
    """The snapshots whose `to_tensors` this is, by step."""
    fields: dict[int, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        step, name = key.split(".")
        fields.setdefault(int(step), {})[name] = tensor.numpy()
    return [Snapshot(step, **fields[step]) for step in sorted(fields)]


def snapshot_steps(affinity: str, steps: int, count: int) -> list[int]:
    """The training steps after which stage 1 takes snapshots: at most `count` of `steps`.

    They are evenly spaced for `"cosine"` and `"lookahead"`, the same in the first fifth for `"early"`, and for
    `"directions"` spaced by a constant factor, since early and late gradients show different things.
    """
    if affinity == "directions":
        wanted = np.geomspace(1, steps, count) if count > 1 else [steps]
    else:
        last = max(1.0, EARLY * steps) if affinity == "early" else steps
        wanted = [last * (number + 1) / count for number in range(count)]
    return sorted({max(1, round(float(step))) for step in wanted})


def affinity_matrix(
    snapshot: Snapshot, affinity: str, weights: np.ndarray | None = None, others: np.ndarray | None = None
) -> np.ndarray:
    r"""The affinity of all pairs of tasks, (tasks, tasks), from one snapshot.

    With $g_i$ the gradient of task i and $L_i$ its loss, it is for `"cosine"` and `"early"` $\cos(g_i, g_j)$, for
    `"directions"` $\cos(D g_i, D g_j)$, where $D$ divides each element by its root mean square over tasks and parts,
    similar to Adam's scaling, so that $-D g_i$ is about the direction in which task i would move the prompts, and for
    `"lookahead"` $\langle g_i, g_j \rangle / (|g_i| L_j)$: the share of $L_j$ by which a step of unit length on task i
    lowers it, to first order. It is made symmetric by the mean of both directions (Fifty et al.,
    "Efficiently Identifying Task Groupings for Multi-Task Learning", 2021).

    Args:
        snapshot, affinity: the snapshot, and one of `AFFINITIES`.
        weights (`np.ndarray`, *optional*): (tasks, parts), how often each part counts. By default once.
        others (`np.ndarray`, *optional*): the same for the second task of each pair. By default as `weights`.
    """
    weights = np.ones(snapshot.losses.shape) if weights is None else weights
    others = weights if others is None else others
    products = snapshot.scaled if affinity == "directions" else snapshot.products
    between = np.einsum("ip,ipjq,jq->ij", weights, products, others, optimize=True)
    own, other = (
        np.sqrt(np.einsum("ip,ipiq,iq->i", each, products, each, optimize=True).clip(min=0))
        for each in (weights, others)
    )
    if affinity == "lookahead":
        found = _divided(between, own[:, None] * (others * snapshot.losses).sum(axis=1))
    else:
        found = _divided(between, own[:, None] * other).clip(-1, 1)
    return (found + found.T) / 2


def _divided(products: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """The quotient; 0 where a norm is 0."""
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def mean_affinity(
    snapshots: Sequence[Snapshot], affinity: str, weights: np.ndarray | None = None, others: np.ndarray | None = None
) -> np.ndarray:
    """The mean of `affinity_matrix` over snapshots, (tasks, tasks)."""
    return np.mean([affinity_matrix(each, affinity, weights, others) for each in snapshots], axis=0)


def reliability(snapshots: Sequence[Snapshot], affinity: str) -> np.ndarray:
    """The affinity of each task to itself, (tasks,), each side from another half of its images. For cosines, 1 means
    that all images agree, and 0 that the affinities of this task are noise of the images (or that it has only one)."""
    half = np.arange(snapshots[0].losses.shape[1]) % 2
    halves = [np.broadcast_to(half == side, snapshots[0].losses.shape).astype(float) for side in (0, 1)]
    return mean_affinity(snapshots, affinity, *halves).diagonal().copy()


def resampled(snapshots: Sequence[Snapshot], affinity: str, rng: np.random.Generator) -> np.ndarray:
    """The affinity, (tasks, tasks), of snapshots that are drawn with replacement, and for each of them of parts of the
    images that are drawn with replacement, for each task by itself."""
    found = []
    for number in rng.integers(len(snapshots), size=len(snapshots)):
        shares = snapshots[number].has_images.astype(float)
        counts = shares.sum(axis=1).astype(int)
        weights = np.stack([rng.multinomial(count, share / count) for count, share in zip(counts, shares)])
        found.append(affinity_matrix(snapshots[number], affinity, weights.astype(float)))
    return np.mean(found, axis=0)


def co_membership(
    snapshots: Sequence[Snapshot],
    affinity: str,
    partition: Callable[[np.ndarray], np.ndarray],
    found: np.ndarray,
    draws: int,
    seed: int,
    disable_tqdm: bool = False,
) -> tuple[np.ndarray, float]:
    """How often two tasks are in the same group when the measurement is repeated, and how stable the groups are.

    Args:
        snapshots, affinity: as for `mean_affinity`.
        partition: makes a partition, (tasks,) group numbers, of an affinity matrix.
        found (`np.ndarray`): (tasks,), the partition whose stability is asked for.
        draws (`int`): bootstrap draws, each of snapshots and of parts of the images.
        seed (`int`): seed of the draws.
        disable_tqdm (`bool`): whether to show no progress bar, which appears after a second.

    Returns:
        (tasks, tasks), the share of draws in which a pair is in the same group, and the mean adjusted Rand index of
        the draws' partitions with `found`: 1 if all are the same, about 0 if they agree by chance only.
    """
    rng = np.random.default_rng(seed)
    bar = tqdm(range(draws), desc="Stability of groups", leave=False, delay=1, disable=disable_tqdm)
    labels = [partition(resampled(snapshots, affinity, rng)) for _ in bar]
    together = np.mean([each[:, None] == each for each in labels], axis=0)
    return together, float(np.mean([adjusted_rand_index(each, found) for each in labels]))


def separation(similarity: np.ndarray, groups: np.ndarray, reliability: np.ndarray) -> float | None:
    """How much larger the mean affinity is inside the groups than across them, in units of the reliability.

    The unit is the mean reliability of affinities from all images, which follows from that of halves, r, as
    2 r / (1 + r) (Spearman and Brown). 1 means that tasks agree with their group as with themselves, more than with
    others; with little, the groups may be found again and again, but there is hardly anything that their tasks share.

    Args:
        similarity (`np.ndarray`): (tasks, tasks).
        groups (`np.ndarray`): (tasks,), the group of each task.
        reliability (`np.ndarray`): (tasks,), as `reliability` returns it.

    Returns:
        `None` if there is one group, or each task is a group of its own.
    """
    pairs = np.triu_indices(len(similarity), 1)
    inside, affinities = np.equal.outer(groups, groups)[pairs], similarity[pairs]
    if inside.all() or not inside.any():
        return None
    unit = similarity.diagonal().mean()  # 1 for cosines
    halves = float(np.clip(reliability / unit, LEAST_RELIABILITY, None).mean())
    return float((affinities[inside].mean() - affinities[~inside].mean()) / unit) * (1 + halves) / (2 * halves)


def adjusted_rand_index(one: Sequence, other: Sequence) -> float:
    """Agreement of two partitions, given as the group of each task (Hubert and Arabie, 1985): 1 if they are the same,
    0 on average if they are random."""
    pairs = [np.equal.outer(each, each)[np.triu_indices(len(each), 1)] for each in map(np.asarray, (one, other))]
    both, first, second = (pairs[0] & pairs[1]).sum(), pairs[0].sum(), pairs[1].sum()
    expected, largest = first * second / max(len(pairs[0]), 1), (first + second) / 2
    return 1.0 if largest == expected else float((both - expected) / (largest - expected))

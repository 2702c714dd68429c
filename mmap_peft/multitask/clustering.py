"""Correlation clustering: the partition that maximises the sum of the gains of all pairs in the same group."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np


MOST_EXACT = 250  # tasks; the linear programs of more take longer than anybody waits
MOST_CUTS = 5000  # constraints that are added at once


@dataclass(frozen=True)
class Clustering:
    """A partition, and how good it is.

    Attributes:
        groups: each in ascending order, ordered by their first members.
        value (`float`): sum of the gains of all pairs in the same group.
        bound (`float`): no partition has a larger sum.
    """

    groups: list[list[int]]
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the value may be from the largest possible one, as a share of the larger of value and bound; 0 if it
        is the largest."""
        gap = (self.bound - self.value) / (max(abs(self.bound), abs(self.value)) or 1.0)
        return gap if gap > 1e-6 else 0.0


def correlation_clustering(
    gains: np.ndarray, max_groups: int | None = None, seconds: float = 30.0, exact: bool = True
) -> Clustering:
    r"""The partition that maximises the sum of the gains of all pairs in the same group (Bansal et al., 2004).

    $$\max \sum_{i<j} g_{ij} x_{ij}, \quad x_{ij} + x_{jk} - x_{ik} \le 1, \quad x_{ij} \in \{0, 1\}$$

    where $x_{ij}$ says that i and j share a group. Greedy additive edge contraction and moves of single tasks and of
    whole groups (Keuper et al., 2015) give a first partition; the linear program, to which the triangles are added
    that its solution violates, gives the bound, and the integer program the best partition (Grötschel and
    Wakabayashi, 1989). The number of groups follows from the gains; `max_groups` bounds it through
    $r_j \ge 1 - \sum_{i<j} x_{ij}$ (j is the first of its group) and $\sum_j r_j \le$ `max_groups`. A pair with a gain
    of 0 stays apart.

    Args:
        gains (`np.ndarray`): (tasks, tasks), symmetric; the diagonal does not count.
        max_groups (`int`, *optional*): largest number of groups.
        seconds (`float`): when to stop looking for a better partition. More than 250 tasks are grouped by the moves
            only.
        exact (`bool`): whether to look for the best partition after the moves, which find it most of the time.
    """
    end = time.monotonic() + seconds
    gains = np.triu(np.asarray(gains, dtype=np.float64), 1)
    gains = gains + gains.T
    # With this small price, a pair with a gain of 0 stays apart.
    priced = gains - 1e-9 * max(1.0, float(np.abs(gains).max(initial=0)))
    np.fill_diagonal(priced, 0)
    limit = len(gains) if max_groups is None else max_groups
    labels = _improved(priced, _contracted(priced, limit), limit, end)
    bound = float(gains[np.triu_indices(len(gains), 1)].clip(min=0).sum())
    if exact and 2 < len(gains) <= MOST_EXACT:
        labels, exact_bound = _exact(priced, labels, max_groups, end)
        bound = min(bound, exact_bound)
    value = _value(gains, labels)
    return Clustering(_groups(labels), value, max(bound, value))


def _value(gains: np.ndarray, labels: np.ndarray) -> float:
    return float(gains[labels[:, None] == labels].sum() / 2)


def _groups(labels: np.ndarray) -> list[list[int]]:
    firsts = np.sort(np.unique(labels, return_index=True)[1])
    return [np.flatnonzero(labels == labels[first]).tolist() for first in firsts]


def _contracted(gains: np.ndarray, limit: int) -> np.ndarray:
    """Join the two groups that gain most, while any gain or there are too many."""
    count = len(gains)
    labels, between = np.arange(count), gains.copy()
    np.fill_diagonal(between, -np.inf)
    best = between.argmax(axis=1) if count else labels  # of each group, the one that it gains most with
    for left in range(count, 1, -1):
        gain = between[np.arange(count), best]
        one = int(gain.argmax())
        if gain[one] <= 0 and left <= limit:
            break
        other = int(best[one])
        labels[labels == other] = one
        between[one] += between[other]
        between[:, one] = between[one]
        between[one, one] = -np.inf
        between[other] = between[:, other] = -np.inf
        stale = np.flatnonzero((best == one) | (best == other))
        best[stale] = between[stale].argmax(axis=1)
        best[one] = between[one].argmax()
        better = between[:, one] > between[np.arange(count), best]
        best[better] = one
    return labels


def _improved(gains: np.ndarray, labels: np.ndarray, limit: int, end: float) -> np.ndarray:
    """Move single tasks to other groups or to one of their own, and join groups, as long as the value rises."""
    count = len(gains)
    least = 1e-10 * max(1.0, float(np.abs(gains).max(initial=0)))  # less is rounding
    labels = np.unique(labels, return_inverse=True)[1]
    member = np.zeros((count, count))  # (tasks, groups), with place for a group of each task
    member[np.arange(count), labels] = 1
    toward = gains @ member  # gain of a task with each group
    while time.monotonic() < end:
        own, sizes = toward[np.arange(count), labels], member.sum(axis=0)
        change = toward - own[:, None]
        empty = np.flatnonzero(sizes == 0)
        change[:, empty[1:] if np.count_nonzero(sizes) < limit else empty] = -np.inf
        task, group = np.unravel_index(change.argmax(), change.shape) if count else (0, 0)
        if count and change[task, group] > least:
            old = labels[task]
            member[task, old], member[task, group], labels[task] = 0, 1, group
            toward[:, old] -= gains[:, task]
            toward[:, group] += gains[:, task]
            continue
        between = member.T @ toward
        np.fill_diagonal(between, -np.inf)
        between[sizes == 0] = between[:, sizes == 0] = -np.inf
        one, other = np.unravel_index(between.argmax(), between.shape) if count else (0, 0)
        if not count or not between[one, other] > least:
            break
        labels[labels == other] = one
        member[:, one] += member[:, other]
        toward[:, one] += toward[:, other]
        member[:, other] = toward[:, other] = 0
    return labels


def _exact(gains: np.ndarray, labels: np.ndarray, max_groups: int | None, end: float) -> tuple[np.ndarray, float]:
    """The best partition and a bound of all, as far as the time allows; at least the given partition."""
    from scipy.optimize import Bounds, milp  # slow to import

    count = len(gains)
    first, second = np.triu_indices(count, 1)
    size = len(first) + (0 if max_groups is None else count)  # variables: x of each pair, then r of each task
    cost = np.zeros(size)
    cost[: len(first)] = -gains[first, second]
    constraints = [] if max_groups is None else [_few_groups(count, max_groups)]
    best, bound, whole = _value(gains, labels), np.inf, False
    while (left := end - time.monotonic()) > 0:
        options = {"mip_rel_gap": 0, "time_limit": left}
        found = milp(
            cost, integrality=np.full(size, int(whole)), bounds=Bounds(0, 1), constraints=constraints, options=options
        )
        if found.x is None:
            break
        if found.status == 0:
            bound = min(bound, -found.fun)
        elif whole and found.mip_dual_bound is not None:
            bound = min(bound, -found.mip_dual_bound)
        x = np.eye(count)
        x[first, second] = x[second, first] = found.x[: len(first)]
        cuts = _violated(x, size)
        if not cuts and np.abs(x - x.round()).max() < 1e-6:
            new = x.round().argmax(axis=0)
            if _value(gains, new) > best:
                labels, best = new, _value(gains, new)
            break
        if found.status or bound <= best + 1e-9 * max(1.0, abs(best)):
            break
        whole = not cuts  # the linear program is as tight as triangles make it
        constraints.extend(cuts)
    return labels, bound


def _few_groups(count: int, max_groups: int) -> Any:
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    _, second = np.triu_indices(count, 1)
    pairs = len(second)
    tasks = np.arange(count)
    rows = np.concatenate([second, tasks, np.full(count, count)])
    columns = np.concatenate([np.arange(pairs), pairs + tasks, pairs + tasks])
    values = np.concatenate([np.full(pairs + count, -1.0), np.ones(count)])
    matrix = csr_array((values, (rows, columns)), shape=(count + 1, pairs + count))
    return LinearConstraint(matrix, ub=[-1] * count + [max_groups])


def _violated(x: np.ndarray, size: int) -> list[Any]:
    """The triangles that a solution violates most: if two of their pairs share a group, so does the third."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    count = len(x)
    column = np.zeros((count, count), dtype=int)  # of a pair's variable
    column[np.triu_indices(count, 1)] = np.arange(count * (count - 1) // 2)
    column += column.T
    rows, excess = [], []
    for middle in range(count):
        over = np.triu(x[:, middle, None] + x[middle] - x - 1, 1)
        over[middle] = over[:, middle] = 0
        one, other = np.nonzero(over > 1e-6)
        rows.append(np.stack([column[one, middle], column[middle, other], column[one, other]], axis=1))
        excess.append(over[one, other])
    chosen = np.concatenate(rows)[np.argsort(-np.concatenate(excess), kind="stable")[:MOST_CUTS]]
    if not len(chosen):
        return []
    signs, starts = np.tile([1.0, 1.0, -1.0], len(chosen)), np.arange(0, chosen.size + 1, 3)
    return [LinearConstraint(csr_array((signs, chosen.ravel(), starts), shape=(len(chosen), size)), ub=1)]

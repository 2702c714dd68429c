"""A partition of the tasks into groups that share prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

from .files import read_json, write_json


MODES = ("gradient", "all", "none", "random", "given")


def correlation_clustering(gains: np.ndarray, max_groups: int | None = None) -> list[list[int]]:
    r"""The partition that maximises the sum of the gains of all pairs in the same group, exactly.

    $$\max \sum_{i<j} g_{ij} x_{ij}, \quad x_{ij} + x_{jk} - x_{ik} \le 1, \quad x_{ij} \in \{0, 1\}$$

    where $x_{ij}$ says that i and j share a group (correlation clustering, Bansal et al., 2004). The number of groups
    follows from the gains; `max_groups` bounds it through $r_j \ge 1 - \sum_{i<j} x_{ij}$ (j is the first of its
    group) and $\sum_j r_j \le$ `max_groups`. A pair with a gain of 0 stays apart.

    Args:
        gains (`np.ndarray`): (tasks, tasks), symmetric; the diagonal does not count.
        max_groups (`int`, *optional*): largest number of groups.

    Returns:
        The groups, each in ascending order, ordered by their first members.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # slow to import

    count = len(gains)
    first, second = np.triu_indices(count, 1)
    pairs, size = len(first), len(first) + count  # variables: x of each pair, then r of each task
    # With this small price, a pair with a gain of 0 stays apart.
    price = 1e-9 * max(1.0, float(np.abs(gains).max()))
    cost = np.concatenate([price - gains[first, second], np.zeros(count)])
    constraints = [LinearConstraint(_triangles(count, size), ub=1)] if count > 2 else []
    if max_groups is not None:
        rows = np.zeros((count + 1, size))
        rows[second, np.arange(pairs)] = -1
        rows[:count, pairs:] = -np.eye(count)
        rows[count, pairs:] = 1
        constraints.append(LinearConstraint(rows, ub=[-1] * count + [max_groups]))
    exactly = {"mip_rel_gap": 0}
    solution = milp(cost, integrality=np.ones(size), bounds=Bounds(0, 1), constraints=constraints, options=exactly)
    together = np.eye(count, dtype=bool)
    together[first, second] = solution.x[:pairs] > 0.5
    first_member = together.argmax(axis=0)
    return [np.flatnonzero(first_member == task).tolist() for task in np.unique(first_member)]


def _triangles(count: int, size: int) -> Any:
    """For each three tasks three rows: if two of their pairs share a group, so does the third."""
    from scipy.sparse import csr_array

    column = np.zeros((count, count), dtype=int)  # of a pair's variable
    column[np.triu_indices(count, 1)] = np.arange(count * (count - 1) // 2)
    i, j, k = np.array(list(combinations(range(count), 3))).T
    sides = np.stack([column[i, j], column[j, k], column[i, k]], axis=1)
    signs = np.tile([[1, 1, -1], [1, -1, 1], [-1, 1, 1]], (len(sides), 1))
    starts = np.arange(0, signs.size + 1, 3)
    return csr_array((signs.ravel(), sides.repeat(3, axis=0).ravel(), starts), shape=(len(signs), size))


@dataclass
class TaskGrouping:
    """A partition of the tasks into groups that share prompts, and the similarities that it was made from.

    Args:
        tasks (`Sequence[str]`): names of the tasks.
        groups (`Sequence[Sequence[str]]`): the partition. The prompts of the first group are the adapter `group_0`.
        similarity (`np.ndarray`, *optional*): (tasks, tasks), cosines of the tasks' gradients, mean of the snapshots.
        snapshots (`np.ndarray`, *optional*): (snapshots, tasks, tasks), the cosines of each snapshot.
        steps (`Sequence[int]`): training step of each snapshot.
        threshold (`float`, *optional*): similarity above which two tasks gain from sharing a group.
        mode (`str`): how the groups were made: `"gradient"`, `"all"`, `"none"`, `"random"` or `"given"`.

    Raises:
        ValueError: the groups are not a partition of the tasks.
    """

    tasks: Sequence[str]
    groups: Sequence[Sequence[str]]
    similarity: np.ndarray | None = None
    snapshots: np.ndarray | None = None
    steps: Sequence[int] = field(default_factory=list)
    threshold: float | None = None
    mode: str = "given"

    def __post_init__(self) -> None:
        self.tasks, self.steps, self.groups = list(self.tasks), list(self.steps), list(map(list, self.groups))
        for name in ("similarity", "snapshots"):
            if getattr(self, name) is not None:
                setattr(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        if sorted(chain(*self.groups)) != sorted(self.tasks) or not all(self.groups):
            raise ValueError(
                f"Groups {self.groups} are no partition of the tasks {self.tasks}; put every task into exactly one "
                "group, and leave no group empty."
            )

    @property
    def spread(self) -> np.ndarray | None:
        """(tasks, tasks), standard deviation of the cosines over the snapshots: how stable the similarity is."""
        return None if self.snapshots is None else self.snapshots.std(axis=0)

    @classmethod
    def from_similarity(
        cls,
        tasks: Sequence[str],
        snapshots: np.ndarray,
        threshold: float | str = "mean",
        max_groups: int | None = None,
        steps: Sequence[int] = (),
    ) -> TaskGrouping:
        """Group tasks by the cosines of their gradients: `correlation_clustering` of `similarity - threshold`.

        Args:
            tasks, snapshots, steps: as for the class.
            threshold: as for the class; `"mean"` is the mean similarity of all pairs.
            max_groups: largest number of groups.
        """
        snapshots = np.asarray(snapshots, dtype=np.float64)
        similarity = snapshots.mean(axis=0)
        if threshold == "mean":
            threshold = similarity[np.triu_indices(len(tasks), 1)].mean() if len(tasks) > 1 else 0.0
        groups = correlation_clustering(similarity - float(threshold), max_groups)
        names = [[tasks[member] for member in group] for group in groups]
        return cls(tasks, names, similarity, snapshots, steps, float(threshold), "gradient")

    @classmethod
    def by_mode(
        cls, mode: str, tasks: Sequence[str], groups: Any = None, max_groups: int | None = None, seed: int = 0
    ) -> TaskGrouping:
        """A grouping that needs no gradients, for comparison.

        Args:
            mode: `"all"` (one group), `"none"` (a group for each task), `"random"` (`max_groups` groups, 2 if not
                given, of about the same size, drawn with `seed`) or `"given"` (`groups`).
            tasks: names of the tasks.

        Raises:
            ValueError: the mode is unknown, or `"given"` has no groups or groups that are not a partition.
        """
        if mode == "all":
            groups = [tasks]
        elif mode == "none":
            groups = [[task] for task in tasks]
        elif mode == "random":
            shuffled = np.random.default_rng(seed).permutation(len(tasks))
            parts = np.array_split(shuffled, min(max_groups or 2, len(tasks)))
            groups = [[tasks[member] for member in sorted(part)] for part in parts]
        elif mode != "given":
            raise ValueError(f"grouping={mode!r} is no choice; write one of {', '.join(MODES)}.")
        elif not groups:
            raise ValueError("grouping='given' needs the groups; write given_groups='art+clipart,product', say.")
        return cls(tasks, groups, mode=mode)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, without loss of precision: `TaskGrouping(**fields)` is the inverse."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    def save(self, path: str | os.PathLike) -> None:
        """Write the grouping to a JSON file."""
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> TaskGrouping:
        """Read a grouping from a JSON file.

        Raises:
            ValueError: the file cannot be read, or holds no grouping. The error names the file.
        """
        fields = read_json(Path(path), finite=False)
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error)[:200].split())
            raise ValueError(
                f"{path} holds no grouping ({reason}); give a file that TaskGrouping.save wrote."
            ) from error

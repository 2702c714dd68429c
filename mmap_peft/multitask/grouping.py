"""A partition of the tasks into groups that share prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from .clustering import correlation_clustering
from .files import read_json, write_json


MODES = ("gradient", "all", "none", "random", "given")


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
        gap (`float`, *optional*): how much more another partition may gain at most, as a share of that; 0 if these
            groups are the best.

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
    gap: float | None = None

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
        seconds: float = 30.0,
    ) -> TaskGrouping:
        """Group tasks by the cosines of their gradients: `correlation_clustering` of `similarity - threshold`.

        Args:
            tasks, snapshots, steps: as for the class.
            threshold: as for the class; `"mean"` is the mean similarity of all pairs.
            max_groups: largest number of groups.
            seconds: when to stop looking for better groups; `gap` then says how much better others may be.
        """
        snapshots = np.asarray(snapshots, dtype=np.float64)
        similarity = snapshots.mean(axis=0)
        if threshold == "mean":
            threshold = similarity[np.triu_indices(len(tasks), 1)].mean() if len(tasks) > 1 else 0.0
        found = correlation_clustering(similarity - float(threshold), max_groups, seconds)
        names = [[tasks[member] for member in group] for group in found.groups]
        return cls(tasks, names, similarity, snapshots, steps, float(threshold), "gradient", found.gap)

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

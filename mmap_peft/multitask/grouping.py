"""A partition of the tasks into groups that share prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from .affinity import Snapshot, affinity_matrix, co_membership, reliability, separation
from .clustering import correlation_clustering
from .files import read_json, read_tensors
from .replacing import DIGESTS, find, replace_files, sha256


MODES = ("gradient", "all", "none", "random", "given")
UNSTABLE = ("all", "none", "keep")
DRAWS = 50  # of the bootstrap
STABLE, SEPARATED = 0.7, 0.5  # least stability and separation of groups that are used: see the study `stability`
MATRICES = ("similarity", "snapshots", "reliability", "together")
SUFFIX = ".safetensors"


@dataclass
class TaskGrouping:
    """A partition of the tasks into groups that share prompts, and the similarities that it was made from.

    Args:
        tasks (`Sequence[str]`): names of the tasks.
        groups (`Sequence[Sequence[str]]`): the partition. The prompts of the first group are the adapter `group_0`.
        similarity (`np.ndarray`, *optional*): (tasks, tasks), the tasks' affinity, mean of the snapshots.
        snapshots (`np.ndarray`, *optional*): (snapshots, tasks, tasks), the affinity of each snapshot.
        steps (`Sequence[int]`): training step of each snapshot.
        threshold (`float`, *optional*): similarity above which two tasks gain from sharing a group.
        mode (`str`): how the groups were made: `"gradient"`, `"all"`, `"none"`, `"random"` or `"given"`.
        gap (`float`, *optional*): how much more another partition may gain at most, as a share of what these groups
            gain; 0 if they are the best.
        affinity (`str`, *optional*): how the affinity was measured, one of `AFFINITIES`.
        reliability (`np.ndarray`, *optional*): (tasks,), affinity of each task to itself, from two halves of its
            images.
        together (`np.ndarray`, *optional*): (tasks, tasks), share of the draws of a bootstrap in which two tasks were
            in the same group.
        stability (`float`, *optional*): agreement of these draws with the groups that were found, a mean adjusted Rand
            index: 1 if all agree, about 0 if by chance only. With less than `STABLE`, 0.7, these groups are not used,
            unless `unstable="keep"`.
        separation (`float`, *optional*): how much larger the affinity is inside the groups that were found than
            across them, in units of the reliability. With less than `SEPARATED`, 0.5, they are not used either.

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
    affinity: str | None = None
    reliability: np.ndarray | None = None
    together: np.ndarray | None = None
    stability: float | None = None
    separation: float | None = None

    def __post_init__(self) -> None:
        self.tasks, self.steps, self.groups = list(self.tasks), list(self.steps), list(map(list, self.groups))
        for name in MATRICES:
            if getattr(self, name) is not None:
                setattr(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        if sorted(chain(*self.groups)) != sorted(self.tasks) or not all(self.groups):
            raise ValueError(
                f"Groups {self.groups} are no partition of the tasks {self.tasks}; put every task into exactly one "
                "group, and leave no group empty."
            )

    @property
    def spread(self) -> np.ndarray | None:
        """(tasks, tasks), standard deviation of the affinity over the snapshots."""
        return None if self.snapshots is None else self.snapshots.std(axis=0)

    @property
    def group_numbers(self) -> np.ndarray:
        """(tasks,), the number of each task's group."""
        return _labels([list(map(self.tasks.index, group)) for group in self.groups])

    @property
    def is_stable(self) -> bool:
        """Whether the groups that were found are stable and separated, or this was not measured."""
        return are_stable(self.stability, self.separation)

    @property
    def remarks(self) -> list[str]:
        """Sentences that say that no stable groups were found, or that others may be better; none if these are stable
        and the best."""
        found = []
        if not self.is_stable:
            values = {"stability": (self.stability, STABLE), "separation": (self.separation, SEPARATED)}
            low = {name: each for name, each in values.items() if each[0] is not None and each[0] < each[1]}
            measured = [f"{name} {value:.2f} is below {least:g}" for name, (value, least) in low.items()]
            used = {1: "one group is used", len(self.tasks): "each task is a group of its own"}
            found.append(
                f"No stable groups ({', '.join(measured)}): "
                f"{used.get(len(self.groups), 'the groups that were found are kept')}."
            )
        if self.gap:
            found.append(
                "These are the best groups that were found in the time of grouping_seconds; others may gain up to "
                f"{self.gap:.1%} more."
            )
        return found

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
        """Group tasks by their affinity: `correlation_clustering` of `similarity - threshold`.

        Args:
            tasks, snapshots, steps: as for the class.
            threshold: as for the class; `"mean"` is the mean similarity of all pairs.
            max_groups: largest number of groups.
            seconds: when to stop looking for better groups; `gap` then says how much better others may be.
        """
        snapshots = np.asarray(snapshots, dtype=np.float64)
        similarity = snapshots.mean(axis=0)
        level = _level(similarity, threshold)
        found = correlation_clustering(similarity - level, max_groups, seconds)
        names = [[tasks[member] for member in group] for group in found.groups]
        return cls(tasks, names, similarity, snapshots, steps, level, "gradient", found.gap)

    @classmethod
    def from_gradients(
        cls,
        tasks: Sequence[str],
        snapshots: Sequence[Snapshot],
        affinity: str,
        threshold: float | str = "mean",
        max_groups: int | None = None,
        unstable: str = "all",
        seconds: float = 30.0,
        seed: int = 0,
        disable_tqdm: bool = False,
    ) -> TaskGrouping:
        """Group tasks by the affinity of their gradients, and measure how reliable it and the groups are.

        Args:
            tasks, threshold, max_groups, seconds: as for `from_similarity`.
            snapshots (`Sequence[Snapshot]`): the gradients of some training steps.
            affinity: one of `AFFINITIES`.
            unstable: what to do with groups that are not stable: `"all"` (one group instead), `"none"` (a group for
                each task) or `"keep"`.
            seed, disable_tqdm: seed of the bootstrap, and whether it shows no progress bar.

        No snapshots raise a `ValueError`.
        """
        if not snapshots:
            raise ValueError(
                "There are no snapshots of gradients to group the tasks by, since stage 1 ended before the first; let "
                "it take more steps, or write grouping='all', say."
            )
        matrices = np.array([affinity_matrix(each, affinity) for each in snapshots], np.float64)
        steps = [each.step for each in snapshots]
        grouping = cls.from_similarity(tasks, matrices, threshold, max_groups, steps, seconds)

        def partition(similarity: np.ndarray) -> np.ndarray:
            gains = similarity - _level(similarity, threshold)
            return _labels(correlation_clustering(gains, max_groups, seconds / DRAWS, exact=False).groups)

        found = grouping.group_numbers
        grouping.affinity, grouping.reliability = affinity, reliability(snapshots, affinity)
        draws = DRAWS, seed, disable_tqdm
        grouping.together, grouping.stability = co_membership(snapshots, affinity, partition, found, *draws)
        grouping.separation = separation(matrices.mean(axis=0), found, grouping.reliability)
        if not grouping.is_stable and unstable != "keep":
            grouping.groups, grouping.gap = cls.by_mode(unstable, tasks).groups, None
        return grouping

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

    def to_dict(self, matrices: bool = True) -> dict[str, Any]:
        """The fields as JSON values, without loss of precision: `TaskGrouping(**fields)` is the inverse.

        Args:
            matrices (`bool`): whether `similarity`, `snapshots`, `reliability` and `together` are among them.
        """
        fields = {name: value for name, value in vars(self).items() if matrices or name not in MATRICES}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The matrices that were measured, without loss of precision: `to_matrices` is the inverse."""
        found = {name: getattr(self, name) for name in MATRICES}
        return {name: torch.tensor(matrix) for name, matrix in found.items() if matrix is not None}

    def save(self, path: str | os.PathLike) -> None:
        """Write the grouping to a JSON file, and its matrices to `<path>.safetensors`."""
        path, fields = Path(path), self.to_dict(matrices=False)
        with replace_files(path.parent, path.name) as new:
            if tensors := self.to_tensors():
                file = new / f"{path.name}{SUFFIX}"
                file.write_bytes(save(tensors))
                fields[DIGESTS] = {file.name: sha256(file)}
            (new / path.name).write_text(json.dumps(fields, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> TaskGrouping:
        """Read a grouping that `save` wrote.

        Raises:
            ValueError: a file cannot be read, or holds no grouping. The error names the file.
        """
        path, name = Path(path), f"{Path(path).name}{SUFFIX}"
        fields = read_json(path, finite=False)
        try:
            digest = fields.pop(DIGESTS, {}).get(name)
            if digest is not None:  # an early version had the matrices in the JSON file
                file = find(path.parent, name, digest)
                if not file.is_file() or sha256(file) != digest:
                    raise ValueError(f"{file} is missing, damaged, or of another saving")
                fields |= to_matrices(read_tensors(file, finite=False))
            return cls(**fields)
        except (AttributeError, TypeError, ValueError) as error:
            reason = " ".join(str(error)[:200].split())
            raise ValueError(
                f"{path} holds no grouping ({reason}); give a file that TaskGrouping.save wrote."
            ) from error


def to_matrices(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The matrices of a grouping, from `TaskGrouping.to_tensors`. Raises a `ValueError` for other names."""
    unknown = tensors.keys() - set(MATRICES)
    if unknown:
        raise ValueError(f"{sorted(unknown)[0][:60]!r} is none of {', '.join(MATRICES)}")
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def are_stable(stability: float | None, separation: float | None) -> bool:
    """Whether groups with this `stability` and `separation` are used; `None`: it was not measured."""
    return (stability is None or stability >= STABLE) and (separation is None or separation >= SEPARATED)


def _labels(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The number of each task's group, (tasks,), given the tasks of each group by number."""
    labels = np.empty(sum(map(len, groups)), dtype=int)
    for number, members in enumerate(groups):
        labels[list(members)] = number
    return labels


def _level(similarity: np.ndarray, threshold: float | str) -> float:
    """The threshold as a number; `"mean"` is the mean of all pairs."""
    if threshold != "mean":
        return float(threshold)
    pairs = similarity[np.triu_indices(len(similarity), 1)]
    return float(pairs.mean()) if len(pairs) else 0.0

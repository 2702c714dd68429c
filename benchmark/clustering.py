"""Measuring how good and how fast the groups of tasks are found, compared with hierarchical clustering."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from tqdm import tqdm

from mmap_peft.multitask.clustering import correlation_clustering
from mmap_peft.multitask.files import write_json

from .machine import origin
from .tables import head_lines, table_lines


KINDS = {"planted": 1.0, "mixed": 0.15, "noise": 0.0}  # how strongly gains depend on the groups that are planted
GROUP = 8  # tasks in a planted group, on average


def measure_clustering(out: Path, sizes: Sequence[int], seconds: float = 30.0, seed: int = 0) -> str:
    """Compare `correlation_clustering` with average linkage, cut where joining two groups gains nothing.

    Writes `clustering.json` and `clustering.md`.

    Args:
        out (`Path`): folder of these two files.
        sizes: numbers of tasks.
        seconds (`float`): time limit of each clustering.
        seed (`int`): seed of the gains.

    Returns:
        The text of `clustering.md`.

    Raises:
        ValueError: a size is less than 2.
    """
    if min(sizes) < 2:
        raise ValueError(f"{min(sizes)} tasks have no pairs; write 2 or more.")
    measurement = {**origin(), "settings": {"limit": f"{seconds:g} s", "seed": seed}, "clustering": []}
    out.mkdir(parents=True, exist_ok=True)
    for kind, size in tqdm([(kind, size) for kind in KINDS for size in sizes], disable=None):
        gains = random_gains(size, KINDS[kind], seed)
        start = time.perf_counter()
        found = correlation_clustering(gains, seconds=seconds)
        middle = time.perf_counter()
        tree = linkage(squareform(gains.max() - gains, checks=False), method="average")
        labels = fcluster(tree, gains.max(), criterion="distance")
        measurement["clustering"].append(
            {
                "kind": kind,
                "tasks": size,
                "seconds": middle - start,
                "value": found.value,
                "gap": found.gap,
                "groups": len(found.groups),
                "linkage_seconds": time.perf_counter() - middle,
                "linkage_value": float(gains[labels[:, None] == labels].sum() / 2),
                "linkage_groups": int(labels.max()),
            }
        )
        write_json(measurement, out / "clustering.json")
    text = clustering_text(measurement)
    (out / "clustering.md").write_text(text)
    return text


def random_gains(tasks: int, strength: float, seed: int) -> np.ndarray:
    """(tasks, tasks), symmetric, with zeros on the diagonal: normal noise, and `strength` more for pairs of the same
    planted group and as much less for all others."""
    rng = np.random.default_rng([seed, tasks])
    groups = rng.integers(max(1, tasks // GROUP), size=tasks)
    upper = np.triu(0.5 * rng.normal(size=(tasks, tasks)) + strength * np.where(groups[:, None] == groups, 1, -1), 1)
    return upper + upper.T


def clustering_text(measurement: dict[str, Any]) -> str:
    """The text of `clustering.md` from the fields of `clustering.json`."""
    heads = ["gains", "tasks", "s", "value", "gap", "groups", "linkage s", "linkage value", "linkage groups"]
    rows = [
        [
            one["kind"],
            one["tasks"],
            f"{one['seconds']:.2f}",
            f"{one['value']:.1f}",
            f"{100 * one['gap']:.1f} %" if one["gap"] else "exact",
            one["groups"],
            f"{one['linkage_seconds']:.2f}",
            f"{one['linkage_value']:.1f}",
            one["linkage_groups"],
        ]
        for one in measurement["clustering"]
    ]
    return "\n".join([*head_lines("Clustering", measurement), *table_lines(heads, rows), ""])

"""The mean accuracy that each protocol reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np


BASE, NEW = HALVES = ("_base", "_new")
HARMONIC = "base_to_new"  # the protocol whose mean is not linear in the accuracies

Accuracy = TypeVar("Accuracy", float, np.ndarray)


def protocol_mean(protocol: str, accuracy: Mapping[str, Accuracy]) -> dict[str, Accuracy]:
    """`mean` of accuracies, and the other fields of a result that a protocol has.

    * `"base_to_new"`: the harmonic mean of `base` and `new`, each a mean over the tasks.
    * `"forgetting"`: the mean over the tasks after the training. `base_after_training` is that of the plain base.
    * others: the mean over the tasks.

    Args:
        protocol (`str`): one of `PROTOCOLS`.
        accuracy: by the name of what was evaluated; arrays of one shape give means of this shape.
    """
    if protocol == HARMONIC:
        base, new = (_mean([value for name, value in accuracy.items() if name.endswith(half)]) for half in HALVES)
        return {"mean": 2 * base * new / np.maximum(base + new, 1e-12), "base": base, "new": new}
    adapted = trained(protocol, accuracy)
    after = [value for name, value in accuracy.items() if name not in adapted]
    return {
        "mean": _mean(list(adapted.values())),
        **({"base_after_training": _mean(after)} if protocol == "forgetting" else {}),
    }


def trained(protocol: str, accuracy: Mapping[str, Accuracy]) -> dict[str, Accuracy]:
    """The accuracies of what was trained: with `"forgetting"`, without those of the plain base."""
    return {name: value for name, value in accuracy.items() if protocol != "forgetting" or not name.endswith(BASE)}


def words(protocol: str) -> str:
    """What the `mean` of a protocol is called in reports."""
    return "harmonic mean of base and new accuracy" if protocol == HARMONIC else "mean accuracy"


def _mean(values: list[Accuracy]) -> Accuracy:
    return sum(values) / len(values)

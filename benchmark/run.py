"""One run of a study."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import DataSet
from .experiment import Experiment


SMALL_CLIP = "small_clip"
# By name, whether the study also has `targets`.
PROTOCOLS = {
    "multi_task": False,
    "base_to_new": False,
    "cross_dataset": True,
    "forgetting": True,
    "leave_one_domain_out": False,
}


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Args:
        experiment (`Experiment`): method and settings.
        data (`DataSet`): the images.
        fraction, shots: how many images train; see `split_at_random`.
        seed (`int`): seed of the split and of training.
        model (`str`): the CLIP: a name on the Hub, a folder, or `"small_clip"`.
        evaluated_on (`str`): `"test"`. `"validation"`: train on two thirds of the training images and evaluate on the
            others; test images are not read. `"groups"`: stage 1 alone, and the groups that each affinity finds.
            `"new_tasks"`: hold out each task once, and add it to the classifier of the others.
        protocol (`str`): one of `PROTOCOLS`, for test images.
        targets (`list[DataSet]`): for the protocols `"cross_dataset"` and `"forgetting"`: whose test images evaluate.
        note (`str`): printed for validation runs: the point of the grid.
    """

    experiment: Experiment
    data: DataSet
    fraction: float | None
    shots: int | None
    seed: int
    model: str = SMALL_CLIP
    evaluated_on: str = "test"
    protocol: str = "multi_task"
    targets: tuple[DataSet, ...] = ()
    note: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """The reverse of `dataclasses.asdict`."""
        parts = {"experiment": Experiment(**values["experiment"]), "data": DataSet(**values["data"])}
        parts["targets"] = tuple(DataSet(**each) for each in values.get("targets", ()))
        return cls(**{**values, **parts})

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on, without paths of this machine. Two runs with the same settings have the same
        accuracies."""
        model = Path(self.model).name if os.path.isdir(self.model) else self.model
        amount = {"fraction": self.fraction} if self.shots is None else {"shots": self.shots}
        return {
            "experiment": {"name": self.experiment.name, **self.experiment.settings},
            "data": self.data.settings,
            **amount,
            "seed": self.seed,
            "model": model,
            "evaluated_on": self.evaluated_on,
            **({} if self.protocol == "multi_task" else {"protocol": self.protocol}),
            **({"targets": [each.settings for each in self.targets]} if self.targets else {}),
        }

    @property
    def key(self) -> dict[str, Any]:
        """What tells this run from the other runs of its study. Each line of a file of results begins with it."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        return {
            "experiment": self.experiment.name,
            "data": self.data.label,
            "amount": f"{100 * self.fraction:g}-percent" if self.shots is None else f"{self.shots}-shots",
            "seed": self.seed,
            "evaluated_on": self.evaluated_on,
            "digest": digest[:8],
        }

    @property
    def place(self) -> str:
        """The data set and how many of its images train."""
        return f"{self.data.label}_{self.key['amount']}"

    @property
    def title(self) -> str:
        """`place` in words."""
        shots = "1 shot" if self.shots == 1 else f"{self.shots} shots"
        return f"{self.data.label}, {f'{100 * self.fraction:g} %' if self.shots is None else shots}"

    @property
    def name(self) -> str:
        """The run's own name within its study; see `run_name`."""
        return run_name(self.key)

    def __str__(self) -> str:
        words = [self.experiment.name, self.title, f"seed {self.seed}"]
        if self.evaluated_on != "test":
            words[1:1] = [self.evaluated_on, self.note] if self.note else [self.evaluated_on]
        return ", ".join(words)


def run_name(key: dict[str, Any]) -> str:
    """The name of a run within its study.

    A run that evaluates on test images keeps its name when its settings change, so that its new result replaces the
    old one. A run that evaluates on validation images has the digest of its settings in its name, so that the results
    of all points of a grid are kept. Runs of the other kinds have the kind in their name.

    Args:
        key: `Run.key`, or the fields of the same names in a line of results.
    """
    place, digest = f"{key['data']}_{key['amount']}", ""
    if key["evaluated_on"] == "validation":
        place, digest = f"validation/{place}", f"_{key['digest']}"
    elif key["evaluated_on"] != "test":
        place = f"{key['evaluated_on']}/{place}"
    return f"{place}/{key['experiment']}{digest}_seed-{key['seed']}"

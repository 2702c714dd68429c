"""A study: experiments on data sets, with fractions or shots and seeds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmap_peft.data.lists import read_names

from .data import DataSet
from .experiment import Experiment
from .planted import planted_groups
from .reading import build, check_mapping, check_name, read_yaml
from .run import PROTOCOLS, SMALL_CLIP, Run


@dataclass(frozen=True)
class Study:
    """All combinations of experiments, data sets, fractions or shots, and seeds.

    Args:
        name (`str`): name of the study and of its folder of results.
        experiments (`list[Experiment]`): methods and their settings.
        data (`list[DataSet]`): the data sets.
        fractions (`list[float]`): shares of the images that train, between 0 and 1; 1 where others are test images.
        shots (`list[int]`): numbers of images of each class that train.
        seeds (`list[int]`): seeds of split and training.
        tune_seeds (`list[int]`): seeds that `tune` uses.
        tune_fractions (`list[float]`): fractions that `tune` uses. If empty, it uses all fractions and shots.
        group_seeds (`list[int]`): seeds of runs of stage 1 alone, which compare the groups that each affinity finds
            with the planted families.
        new_task_seeds (`list[int]`): seeds of runs that hold out each task once, and add it to a trained classifier.
        protocol (`str`): one of `PROTOCOLS`; see `benchmark.protocols.trainings`. `tune` uses `"multi_task"`.
        targets (`list[DataSet]`): for the protocols `"cross_dataset"` and `"forgetting"`, required: whose test images
            evaluate.
        reference (`str`, *optional*): the experiment that the report compares with the others. By default the best.
        model (`str`): the CLIP: a name on the Hub, a folder, or `"small_clip"`.
        training (`dict`): training arguments of all experiments. They override those of the experiments.
        tasks (`str`, *optional*): how the tasks of all experiments train, instead of what the experiments say.

    Raises:
        ValueError: a field has an invalid value, or two experiments or two data sets have the same name.
    """

    name: str
    experiments: list[Experiment]
    data: list[DataSet]
    fractions: list[float] = field(default_factory=list)
    shots: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    tune_seeds: list[int] = field(default_factory=lambda: [0])
    tune_fractions: list[float] = field(default_factory=list)
    group_seeds: list[int] = field(default_factory=list)
    new_task_seeds: list[int] = field(default_factory=list)
    protocol: str = "multi_task"
    targets: list[DataSet] = field(default_factory=list)
    reference: str | None = None
    model: str = SMALL_CLIP
    training: dict[str, Any] = field(default_factory=dict)
    tasks: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "Study")
        check_mapping(self.training, f"training of study {self.name!r}")
        limits = {"shots": (1, int), "seeds": (0, int), "tune_seeds": (0, int)}
        limits |= {"fractions": (0, float), "tune_fractions": (0, float)}
        limits |= {"group_seeds": (0, int), "new_task_seeds": (0, int)}
        needed = ("experiments", "data", "seeds", "tune_seeds")
        for part in ("experiments", "data", *limits):
            value = getattr(self, part)
            if not isinstance(value, list) or (not value and part in needed):
                raise ValueError(f"{part} of study {self.name!r} is {value!r}; write a list.")
        for part, (least, kind) in limits.items():
            for value in getattr(self, part):
                if type(value) is not kind or value < least or (kind is float and not 0 < value <= 1):
                    wanted = "numbers between 0 and 1" if kind is float else f"whole numbers of {least} or more"
                    raise ValueError(f"{part} of study {self.name!r} has {value!r}; write {wanted}.")
        if not self.fractions and not self.shots:
            raise ValueError(f"Study {self.name!r} does not say how many images train; write fractions or shots.")
        experiments = self.experiments
        if self.training or self.tasks:
            experiments = [
                replace(one, training={**one.training, **self.training}, tasks=self.tasks or one.tasks)
                for one in experiments
            ]
            object.__setattr__(self, "experiments", experiments)
        names_by_part = {"experiments": [one.name for one in experiments]}
        names_by_part |= {part: [one.label for one in getattr(self, part)] for part in ("data", "targets")}
        for part, names in names_by_part.items():
            if len(set(names)) < len(names):
                raise ValueError(f"Study {self.name!r} has {part} of the same name, {sorted(names)}; rename one.")
        self._check_protocol()
        if self.reference not in (None, *names_by_part["experiments"]):
            raise ValueError(
                f"reference of study {self.name!r} is {self.reference!r}, which is none of its experiments; add it."
            )

    def _check_protocol(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ValueError(
                f"protocol of study {self.name!r} is {self.protocol!r}; write one of {', '.join(PROTOCOLS)}."
            )
        if bool(self.targets) != PROTOCOLS[self.protocol]:
            what = "needs targets, data sets" if PROTOCOLS[self.protocol] else "takes no targets; leave them out"
            raise ValueError(f"protocol {self.protocol!r} of study {self.name!r} {what}.")
        alone = [one.name for one in self.experiments if one.tasks == "alone"]
        if alone and self.protocol == "leave_one_domain_out":
            raise ValueError(
                f"Experiment {alone[0]!r} trains each task alone, which protocol {self.protocol!r} of study "
                f"{self.name!r} has no use for; leave it out."
            )

    @classmethod
    def read(cls, path: str | os.PathLike) -> Study:
        """Read a study from a YAML file.

        Each of its experiments is the name of a file `../experiments/<name>.yaml`, or a path that ends in `.yaml`;
        both are relative to the folder of the study.

        Raises:
            ValueError: as for the class, or a file is missing or has other fields.
        """
        path = Path(path)
        values = read_yaml(path)
        for name in ("experiments", "data", "targets"):
            if name in values and not isinstance(values[name], list):
                raise ValueError(f"{name} in {path} is {values[name]!r}; write a list.")
        if "experiments" in values:
            values["experiments"] = [_read_experiment(given, path.parent) for given in values["experiments"]]
        for part in ("data", "targets"):
            for number, entry in enumerate(values.get(part, [])):
                check_mapping(entry, f"An entry of {part} in {path}")
                if str(entry.get("suite", "")).endswith(".yaml"):
                    entry["suite"] = str(path.parent / entry["suite"])
                if isinstance(entry.get("duplicates"), str):
                    entry["duplicates"] = str(path.parent / Path(entry["duplicates"]).expanduser())
                values[part][number] = build(DataSet, entry, f"{part} in {path}")
        return build(cls, values, path)

    def prepare(self) -> None:
        """Read all lists of duplicates and download the data sets of all suites, so that what cannot be read is known
        before the first run."""
        for data in (*self.data, *self.targets):
            if data.duplicates:
                read_names(Path(data.duplicates))
        for data in (*self.data, *self.targets):
            if data.suite:
                data.suite_images()

    def runs(self, experiments: list[Experiment] | None = None) -> list[Run]:
        """All runs of some experiments, by default those of the study. Runs on the same images follow each other."""
        how = {"model": self.model, "protocol": self.protocol, "targets": tuple(self.targets)}
        return [
            Run(experiment, data, seed=seed, **how, **amount)
            for data in self.data
            for amount in self.amounts
            for seed in self.seeds
            for experiment in (self.experiments if experiments is None else experiments)
        ]

    def planted_runs(self, evaluated_on: str) -> list[Run]:
        """The runs of the first experiment on planted families that are evaluated on `"groups"` or `"new_tasks"`."""
        seeds = self.group_seeds if evaluated_on == "groups" else self.new_task_seeds
        runs = replace(self, seeds=seeds or [0]).runs(self.experiments[:1]) if seeds else []
        least = 2 if evaluated_on == "new_tasks" else 1  # groups to choose from
        runs = [run for run in runs if run.data.family and len(planted_groups(run.data.family)) >= least]
        return [replace(run, evaluated_on=evaluated_on) for run in runs]

    def validation_runs(self, experiment: Experiment) -> list[list[Run]]:
        """For each point of an experiment's grid, the runs whose accuracies are compared by `tune`."""
        return [
            [
                replace(run, evaluated_on="validation", note=point_text(point))
                for run in self.tuning.runs([experiment.at(point)])
            ]
            for point in experiment.points
        ]

    @property
    def tuning(self) -> Study:
        """The study with the seeds, fractions and shots that `tune` uses."""
        fields = {"seeds": self.tune_seeds, "protocol": "multi_task", "targets": []}
        if self.tune_fractions:
            fields |= {"fractions": self.tune_fractions, "shots": []}
        return replace(self, **fields)

    @property
    def amounts(self) -> list[dict[str, Any]]:
        """`fraction` and `shots` of the runs: first all fractions, then all shots."""
        fractions = [{"fraction": value, "shots": None} for value in self.fractions]
        return fractions + [{"fraction": None, "shots": value} for value in self.shots]


def point_text(point: dict[str, Any]) -> str:
    """A point of a grid as text."""
    return ", ".join(f"{key}: {value}" for key, value in point.items())


def _read_experiment(given: Any, folder: Path) -> Experiment:
    """Read an experiment, given by its name or by a path relative to `folder`, the folder of the study."""
    if str(given).endswith(".yaml"):
        file = folder / str(given)
    else:
        check_name(given, "Experiment")
        file = folder.parent / "experiments" / f"{given}.yaml"
    return build(Experiment, {"name": file.stem, **read_yaml(file)}, file)

"""The data sets of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from mmap_peft.data.domains import read_domains
from mmap_peft.data.duplicates import drop_duplicates
from mmap_peft.data.mini_domainnet import read_mini_domainnet, read_mini_lists
from mmap_peft.data.pictograms import CLASS_NAMES, PER_CLASS, pictogram_domains
from mmap_peft.data.splits import Split, draw, make_tasks, read_lists, split_at_random
from mmap_peft.data.validation import hold_out
from mmap_peft.multitask.task import Task

from .planted import PLANTED, ladder_domains, planted_domains, planted_groups, some_classes
from .reading import check_name
from .suite_files import read_suite


TAKES = {  # which fields each data set takes besides `name` and `label`
    "pictograms": {"per_class", "classes"},
    "planted": {"family", "per_class"},
    "ladder": {"tasks", "per_class"},
    "office_home": {"path", "split_dir"},
    "mini_domainnet": {"path", "split_dir", "at_most"},
    "folder": {"path", "split_dir", "at_most"},
    "suite": {"suite", "path", "at_most"},
}
VALIDATION = 1 / 3  # share of the training images of each class that validation runs evaluate on


@dataclass(frozen=True)
class DataSet:
    """A data set of a study.

    Args:
        name (`str`): `"pictograms"`, `"planted"` or `"ladder"` (tasks made of pictograms), `"office_home"`,
            `"mini_domainnet"`, `"folder"` for any other folder of `domain/class/image`, or `"suite"`.
        path (`str`, *optional*): its folder or its name on the Hub. Required, except for pictograms and suites. Of a
            suite: a folder of local copies of data sets, each in a folder with the name of its task.
        split_dir (`str`, *optional*): folder of published lists of training and test images.
        per_class (`int`, *optional*): for pictograms: images of each class and domain.
        classes (`list[int]`, *optional*): for pictograms: `[first, last]`, only the classes with these numbers,
            without `last`.
        family (`str`, *optional*): for `"planted"`, required: one of `PLANTED`.
        tasks (`int`, *optional*): for `"ladder"`, required: a multiple of 4 up to 96.
        at_most (`int`, *optional*): without lists: use at most this many images of each class and domain.
        suite (`str`, *optional*): for `"suite"`, required: the name of a file in `benchmark/suites`, or a path.
        drop_duplicates (`bool`): leave training images out that are near-duplicates of test images.
        duplicates (`str`, *optional*): with `drop_duplicates`: file of more images to leave out, one a line.
        label (`str`, *optional*): its name in results and tables. By default `name`, or the suite's.

    Raises:
        ValueError: `name` is unknown, a field is missing, or this data set does not take a field.
    """

    name: str
    path: str | None = None
    split_dir: str | None = None
    per_class: int | None = None
    at_most: int | None = None
    classes: list[int] | None = None
    family: str | None = None
    tasks: int | None = None
    suite: str | None = None
    drop_duplicates: bool = False
    duplicates: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if self.name not in TAKES:
            raise ValueError(f"{self.name!r} is no data set of a study; write one of {', '.join(TAKES)}.")
        if self.label is None:
            object.__setattr__(self, "label", Path(self.suite).stem if isinstance(self.suite, str) else self.name)
        check_name(self.label, "Label")
        given = {name for name, value in vars(self).items() if value is not None}
        given -= {"name", "label", "drop_duplicates", "duplicates"}
        if given - TAKES[self.name]:
            raise ValueError(
                f"Data set {self.name!r} was given {', '.join(sorted(given - TAKES[self.name]))}; it takes "
                f"{', '.join(sorted(TAKES[self.name]))}."
            )
        if self.name == "suite":
            object.__setattr__(self, "_suite", read_suite(self.suite))
        elif "path" in TAKES[self.name] and self.path is None:
            raise ValueError(f"Data set {self.name!r} has no path; write its folder, or its name on the Hub.")
        if type(self.drop_duplicates) is not bool or (self.duplicates is not None and not self.drop_duplicates):
            raise ValueError(
                f"drop_duplicates of data set {self.label!r} is {self.drop_duplicates!r} and duplicates is "
                f"{self.duplicates!r}; write `drop_duplicates: true`, with or without a file of duplicates."
            )
        if self.name == "planted" and self.family not in PLANTED:
            raise ValueError(f"family of data set {self.label!r} is {self.family!r}; write {', '.join(PLANTED)}.")
        if self.name == "ladder" and self.tasks not in range(4, 97, 4):
            raise ValueError(f"tasks of data set {self.label!r} is {self.tasks!r}; write a multiple of 4, up to 96.")
        if self.classes is not None:
            pair = isinstance(self.classes, list) and len(self.classes) == 2 and {*map(type, self.classes)} == {int}
            if not pair or not 0 <= self.classes[0] <= self.classes[1] - 2 <= len(CLASS_NAMES) - 2:
                raise ValueError(
                    f"classes of data set {self.label!r} is {self.classes!r}; write [first, last], with two "
                    f"or more classes of 0 to {len(CLASS_NAMES)}."
                )
        for name, least in (("per_class", 2), ("at_most", 2)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} of data set {self.name!r} is {value!r}; write a whole number of 2 or more.")

    @property
    def settings(self) -> dict[str, Any]:
        """All fields that decide which images there are, without paths of this machine."""
        options = {"lists": self.split_dir is not None, "per_class": self.per_class, "at_most": self.at_most}
        options |= {"family": self.family, "tasks": self.tasks, "drop_duplicates": self.drop_duplicates}
        options |= {"duplicates": self.duplicates is not None, "classes": self.classes}
        if self.suite:
            options |= {"suite": self._suite.name, "suite_digest": self._suite.digest}
        return {"name": self.name, "label": self.label, **{name: value for name, value in options.items() if value}}

    def suite_images(self) -> dict[str, Dataset]:
        """The images of a suite, from `path` where it has a folder for a task, otherwise from the Hub."""
        if self.path and not Path(self.path).is_dir():
            raise ValueError(f"{self.path} is no folder; write one that has a folder for each task, such as sun397.")
        folders = {task.name: Path(self.path, task.name) for task in self._suite.tasks} if self.path else {}
        return self._suite.read({name: folder for name, folder in folders.items() if folder.is_dir()})

    def read(self, fraction: float | None, shots: int | None, seed: int) -> tuple[dict[str, Dataset], Split]:
        """Read the domains, and choose which of their images train and which evaluate.

        Args:
            fraction, shots, seed: as for `split_at_random`. Office-Home's lists know fractions only, and no seed.
        """
        domains, split = self._read(fraction, shots, seed)
        return domains, drop_duplicates(domains, split, self.duplicates) if self.drop_duplicates else split

    def _read(self, fraction: float | None, shots: int | None, seed: int) -> tuple[dict[str, Dataset], Split]:
        if self.classes:
            domains = some_classes(*self.classes, self.per_class or PER_CLASS)
        elif self.name == "pictograms":
            domains = pictogram_domains(self.per_class or PER_CLASS)
        elif self.name == "planted":
            domains = planted_domains(self.family, self.per_class or PER_CLASS, seed)
        elif self.name == "ladder":
            domains = ladder_domains(self.tasks, self.per_class or PER_CLASS)
        elif self.name == "suite":
            domains = self.suite_images()
        elif self.name == "mini_domainnet":
            domains = read_mini_domainnet(self.path)
        else:
            domains = read_domains(self.path)
        if self.split_dir and self.name == "mini_domainnet":
            return domains, draw(read_mini_lists(self.split_dir), fraction, shots, seed)
        if self.split_dir:
            if fraction is None:
                raise ValueError(
                    f"The lists in {self.split_dir} are of fractions, not of {shots} shots; write fractions, or "
                    "leave split_dir out."
                )
            return domains, read_lists(self.split_dir, fraction)
        return domains, split_at_random(domains, fraction, shots, seed, self.at_most)

    def make_tasks(self, split: Split, domains: dict[str, Dataset], template: str | Sequence[str]) -> list[Task]:
        """One task for each domain. A suite has templates of its own."""
        if self.suite:
            return self._suite.make_tasks(domains, split)
        return make_tasks(domains, split, template, dataset=Path(self.path).name if self.path else "Pictograms")

    def hold_out(
        self, split: Split, domains: dict[str, Dataset], template: str | Sequence[str], seed: int
    ) -> tuple[list[Task], Split]:
        """Tasks of the training images only, and their split: a third of each class evaluates, the others train.

        Raises:
            ValueError: a task has only one training image of each class.
        """
        images, inner = hold_out(domains, split, VALIDATION, seed)
        return self.make_tasks(inner, images, template), inner

    def groups(self, name: str, seed: int) -> list[list[str]]:
        """Groups of the tasks of `"planted"`: `"planted"`, the families, or `"random 1"` and so on, which are drawn at
        random, of the same sizes, or two halves of a single family.

        Raises:
            ValueError: the data set has no families, or `name` is none of these.
        """
        kind, _, number = name.partition(" ")
        if self.family is None or kind not in ("planted", "random") or (kind == "random") != number.isdigit():
            raise ValueError(
                f"{name!r} is no grouping of data set {self.label!r}; write 'planted' or 'random 1' for planted "
                "families only."
            )
        families = planted_groups(self.family)
        if kind == "planted":
            return families
        tasks = [task for group in families for task in group]
        sizes = [len(each) for each in families] if len(families) > 1 else [len(tasks) // 2]
        order = np.random.default_rng([seed, int(number)]).permutation(len(tasks))
        parts = np.split(order, np.cumsum(sizes)[: max(1, len(families) - 1)])
        return [[tasks[place] for place in sorted(part)] for part in parts]

"""An experiment: a method and its settings."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from peft import PeftConfig

from mmap_peft.checking import Count, checked
from mmap_peft.methods import by_name
from mmap_peft.multitask.arguments import MultiTaskTrainingArguments
from mmap_peft.multitask.lora_merging import Density, Weights
from mmap_peft.multitask.wise_ft import Share
from mmap_peft.prompts.method import Rank

from .reading import check_mapping, check_name


METHODS: dict[str, Callable[..., PeftConfig] | None] = {"zero_shot": None, **by_name.METHODS}
# Training arguments that an experiment cannot set, since the benchmark evaluates once, after the last step.
FIXED = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
}
# Fields of `merging`, without and with `tasks="merged"`.
WISE_FT = {"alpha": Share}
TIES = {"density": Density, "weights": Weights, "rank": Rank | None}
OPTIONAL = ("merging", "steps_per_shot", "groups", "routing")  # in `Experiment.settings` if they are set
OF_THE_RUN = ("output_dir", "seed", "data_seed", "use_cpu")


@dataclass(frozen=True)
class Experiment:
    """A method and its settings.

    Args:
        name (`str`): its name in results and tables.
        method (`str`): one of `METHODS`.
        config (`dict`): fields of the method's config.
        training (`dict`): fields of `MultiTaskTrainingArguments`, except those in `FIXED` and `OF_THE_RUN`.
        tasks (`str`): `"together"`: one classifier for all tasks. `"alone"`: one classifier for each task, without
            groups, as the single-task baseline. `"merged"`: LoRA of each task alone, and then `merge_lora`.
        merging (`dict`): what follows the training: `alpha` of `wise_ft`, for full fine-tuning and BitFit, or
            arguments of `merge_lora`, for `tasks="merged"`.
        steps_per_shot (`int`, *optional*): steps for each training image of a class, the mean of those that train,
            rounded up; in place of `max_steps`, which overrides it.
        groups (`str`, *optional*): given groups of planted tasks: `"planted"`, the families, or `"random 1"` and so
            on, drawn at random, of the same sizes.
        routing (`bool`): also predict test images whose task is not given.
        grid (`dict[str, list]`): values that `tune` chooses from, by `"training.<field>"`, `"config.<field>"` or
            `"merging.<field>"`.
        chosen_as (`str`, *optional*): name of another experiment of the same study, whose chosen values are used
            instead of a grid.

    Raises:
        ValueError: a field has an invalid value.
    """

    name: str
    method: str
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tasks: str = "together"
    merging: dict[str, Any] = field(default_factory=dict)
    steps_per_shot: int | None = None
    groups: str | None = None
    routing: bool = False
    grid: dict[str, list[Any]] = field(default_factory=dict)
    chosen_as: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "Experiment")
        for part in ("config", "training", "merging", "grid"):
            check_mapping(getattr(self, part), f"{part} of experiment {self.name!r}")
        if self.method not in METHODS:
            raise ValueError(
                f"Experiment {self.name!r} has method {self.method!r}; write one of {', '.join(METHODS)}."
            )
        self._check_merging()
        together = sorted({"grouping", "sharing"} & set(self.training)) + ["groups"] * (self.groups is not None)
        if self.groups is not None and together != ["groups"]:
            raise ValueError(f"Experiment {self.name!r} has groups and {together[0]}; write one of the two.")
        if self.tasks != "together" and together:
            raise ValueError(
                f"Experiment {self.name!r} trains each task alone, so {together[0]} has no meaning; leave it out."
            )
        if self.chosen_as is not None and self.grid:
            raise ValueError(f"Experiment {self.name!r} has a grid and chosen_as; write one of the two.")
        known = {known.name for known in fields(MultiTaskTrainingArguments) if known.init}
        for name in self.training:
            if name in FIXED or name in OF_THE_RUN or name not in known:
                reason = "is no training argument" if name not in known else "is set by the benchmark"
                raise ValueError(f"{name!r} in training of experiment {self.name!r} {reason}; leave it out.")
        for key, values in self.grid.items():
            part, _, name = key.partition(".")
            if part not in ("training", "config", "merging") or not name or not isinstance(values, list) or not values:
                raise ValueError(
                    f"grid of experiment {self.name!r} has {key!r}: {values!r}; write lists, such as "
                    "`training.learning_rate: [0.01, 0.03]`."
                )
        for point in self.points:
            changed = self.at(point) if point else self
            try:
                changed.peft_config()
                changed.arguments()
            except (ValueError, TypeError) as error:
                raise ValueError(f"Experiment {self.name!r} cannot be run: {error}") from error

    def _check_merging(self) -> None:
        """Raise a `ValueError` if `tasks`, `merging` and `steps_per_shot` do not go with the method."""
        if self.tasks not in ("together", "alone", "merged"):
            raise ValueError(
                f"Experiment {self.name!r} has tasks {self.tasks!r}; write 'together', 'alone' or 'merged'."
            )
        merged = self.tasks == "merged"
        if merged and self.method not in ("lora", "clip_lora"):
            raise ValueError(f"Experiment {self.name!r} merges {self.method}; write method lora or clip_lora.")
        if not merged and self.merging and self.method not in ("full_fine_tuning", "bitfit"):
            raise ValueError(
                f"Experiment {self.name!r} has merging and method {self.method}; write method full_fine_tuning or "
                "bitfit, or tasks: merged."
            )
        kinds = TIES if merged else WISE_FT
        for name, value in self.merging.items():
            if name not in kinds:
                raise ValueError(
                    f"{name!r} in merging of experiment {self.name!r} is none of its fields; write {', '.join(kinds)}."
                )
            checked(value, kinds[name], name)
        checked(self.steps_per_shot, Count | None, "steps_per_shot")

    @property
    def points(self) -> list[dict[str, Any]]:
        """All points of the grid, as dicts. Without a grid this is one empty point."""
        return [dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values())]

    def at(self, point: dict[str, Any]) -> Experiment:
        """The experiment with the values of one point of its grid."""
        changed = {part: dict(getattr(self, part)) for part in ("training", "config", "merging")}
        for key, value in point.items():
            part, _, name = key.partition(".")
            changed[part][name] = value
        return replace(self, grid={}, chosen_as=None, **changed)

    @property
    def settings(self) -> dict[str, Any]:
        """All of its fields that its results depend on."""
        settings = {"method": self.method, "config": self.config, "training": self.training, "tasks": self.tasks}
        return settings | {name: value for name in OPTIONAL if (value := getattr(self, name))}

    def peft_config(self) -> PeftConfig | None:
        """The method's config; `None` for zero-shot."""
        config_class = METHODS[self.method]
        if config_class is None and self.config:
            raise ValueError(f"zero_shot has no settings, but config is {self.config}; leave it out.")
        return None if config_class is None else config_class(**self.config)

    def arguments(self, **more: Any) -> MultiTaskTrainingArguments:
        """The trainer's settings, with the fields in `more`."""
        return MultiTaskTrainingArguments(**{**self.training, **FIXED, **more})

"""The parts of a classifier's folder, checked before anything is made of them: the folder may come from anybody."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Le, Len
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel
from typing_extensions import NotRequired, TypedDict  # pydantic needs these before Python 3.12

from ..checking import checked, shortened
from ..patterns import check_pattern
from ..prompts.method import check_config
from ..registration import check_peft_type
from .affinity import AFFINITIES
from .base_record import BaseRecord
from .files import read_json
from .grouping import MATRICES, MODES, TaskGrouping, to_matrices
from .record import TrainingRecord
from .saving import CONFIG_FILE, DIGEST, DIGESTS, TASKS_FILE, WEIGHTS_FILE, content_digest
from .task import Task
from .task_probes import PREFIX


Texts = str | Annotated[list[str], Len(1)]
LARGEST_NUMBER = 1e6
_Number = Annotated[
    float, Ge(-LARGEST_NUMBER), Le(LARGEST_NUMBER)
]  # a cosine, or a user's own number that can be drawn
Matrix = list[list[_Number]]
LARGEST_USUAL = 1024  # a setting of this size takes little memory


class _Task(TypedDict):
    name: str
    class_names: Annotated[list[str], Len(2)]
    template: Texts
    class_texts: NotRequired[dict[str, Texts]]
    dataset: NotRequired[str | None]
    classes_for_training: NotRequired[Annotated[list[str], Len(2)] | None]
    route: Annotated[list[str], Len(1)]


class _Grouping(TypedDict):
    tasks: list[str]
    groups: list[list[str]]
    similarity: NotRequired[Matrix | None]
    snapshots: NotRequired[list[Matrix] | None]
    steps: NotRequired[list[int]]
    threshold: NotRequired[float | None]
    mode: NotRequired[Literal[MODES]]
    gap: NotRequired[float | None]
    affinity: NotRequired[Literal[AFFINITIES] | None]
    reliability: NotRequired[list[_Number] | None]
    together: NotRequired[Matrix | None]
    stability: NotRequired[Annotated[float, Ge(-1), Le(1)] | None]
    separation: NotRequired[_Number | None]


class _Description(TypedDict):
    base_model: NotRequired[str | None]
    base: NotRequired[dict[str, Any] | None]
    adapters: Annotated[list[str], Len(1)]
    tasks: Annotated[list[_Task], Len(1)]
    training: NotRequired[Any]
    grouping: NotRequired[_Grouping | None]
    files: NotRequired[dict[str, str]]
    sha256: NotRequired[str]


@dataclass
class Description:
    """The content of `tasks.json`, in objects.

    Attributes:
        unchanged (`bool`): whether it has the SHA-256 that was saved in it, or none was.
    """

    base_model: str | None
    base: BaseRecord
    adapters: list[str]
    tasks: list[Task]
    routes: dict[str, tuple[str, ...]]
    record: TrainingRecord
    grouping: TaskGrouping | None
    digests: dict[str, str]
    unchanged: bool

    @classmethod
    def of(cls, folder: Path) -> Description:
        """Read the description of a folder.

        Raises:
            ValueError: `tasks.json` is missing, or not of the form that `save_pretrained` writes.
        """
        path = folder / TASKS_FILE
        try:
            content = read_json(path)
            fields = checked(content, _Description, TASKS_FILE)
            wrong = [name for name in fields["adapters"] if not re.fullmatch(r"\w{1,255}", name)]
            if wrong:  # the names become paths
                raise ValueError(f"it names adapters {shortened(wrong)}, which are no names of adapter folders")
            unchanged = fields.get(DIGEST) in (None, content_digest(content))
            return cls._of(fields, unchanged)
        except ValueError as error:
            raise ValueError(
                f"{folder} holds no readable {TASKS_FILE} ({str(error)[:250]}); give a folder that save_pretrained "
                "wrote."
            ) from error

    @classmethod
    def _of(cls, fields: dict[str, Any], unchanged: bool) -> Description:
        adapters, routes = fields["adapters"], {task["name"]: tuple(task["route"]) for task in fields["tasks"]}
        tasks = [Task(**{name: value for name, value in task.items() if name != "route"}) for task in fields["tasks"]]
        for what, names in ("an adapter", adapters), ("a task", [task["name"] for task in fields["tasks"]]):
            if len(set(names)) < len(names):
                raise ValueError(f"it names {what} twice")
        for name, route in routes.items():
            if len(set(route)) < len(route) or not set(route) <= set(adapters):
                raise ValueError(f"the route of task {name[:60]!r} is not one of its adapters")
        grouping = fields.get("grouping")
        return cls(
            fields.get("base_model"),
            BaseRecord.from_dict(fields.get("base")),
            adapters,
            tasks,
            routes,
            TrainingRecord.from_dict(fields.get("training", {})),
            None if grouping is None else _grouping(grouping, list(routes)),
            fields.get(DIGESTS, {}),
            unchanged,
        )


def _grouping(fields: dict[str, Any], tasks: list[str]) -> TaskGrouping:
    grouping = TaskGrouping(**fields)
    if sorted(grouping.tasks) != sorted(tasks):
        raise ValueError("its grouping is one of other tasks")
    _check_matrices(grouping)
    return grouping


def with_matrices(grouping: TaskGrouping | None, tensors: dict[str, torch.Tensor], path: Path) -> TaskGrouping:
    """A grouping with the matrices of a file. Raises a `ValueError` if they are none that it can have."""
    try:
        if grouping is None:
            raise ValueError(f"there is no grouping in {TASKS_FILE}")
        grouping = replace(grouping, **to_matrices(tensors))
        _check_matrices(grouping)
    except ValueError as error:
        raise ValueError(f"{path} holds no matrices of the grouping ({str(error)[:200]}); restore it.") from error
    return grouping


def _check_matrices(grouping: TaskGrouping) -> None:
    count = len(grouping.tasks)
    for name in MATRICES:
        matrix, size = getattr(grouping, name), (count,) if name == "reliability" else (count, count)
        if matrix is not None and matrix.shape != (size if name != "snapshots" else (len(matrix), *size)):
            raise ValueError(f"grouping.{name} has no row and column for each task")
        if matrix is not None and not (np.abs(matrix) <= LARGEST_NUMBER).all():
            raise ValueError(f"grouping.{name} holds numbers larger than {LARGEST_NUMBER:.0f}")


def read_config(path: Path) -> PeftConfig:
    """The settings in an `adapter_config.json`.

    Raises:
        ValueError: a damaged file, a method that cannot be trained here, or settings of other types or out of range.
    """
    fields = checked(read_json(path), dict[str, Any], CONFIG_FILE)
    fields.pop("runtime_config", None)
    try:
        check_peft_type(fields.get("peft_type"))
        _check_harmless(fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of settings of later versions, which it leaves out
            config = PEFT_TYPE_TO_CONFIG_MAPPING[fields["peft_type"]].from_peft_type(**fields)
            check_config(config)
    except Exception as error:  # configs of PEFT raise exceptions of many kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} holds settings that cannot be used ({reason}).") from error
    return config


def _check_harmless(fields: dict[str, Any]) -> None:
    """Raise a `ValueError` for settings of PEFT that import modules, change the base or never end."""
    for name in ("megatron_config", "corda_config", "eva_config", "loftq_config", "lora_ga_config", "arrow_config"):
        if fields.get(name):
            raise ValueError(f"{name} cannot be taken from a folder")
    start = fields.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in ("gaussian", "orthogonal"):
        raise ValueError(f"init_lora_weights={shortened(start)} would change the base")
    for name, value in fields.items():
        if re.search("modules|pattern|parameters", name):  # PEFT makes expressions of names in lists and keys, too
            for pattern in [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []:
                if isinstance(pattern, str):
                    check_pattern(pattern)


def check_sizes(config: PeftConfig, model: PreTrainedModel, weights: dict[str, dict[str, torch.Tensor]]) -> None:
    """Raise a `ValueError` if settings ask for other tensors than the files hold, before memory is taken for them."""
    if max(_numbers(vars(config)), default=0) <= LARGEST_USUAL:
        return  # the classifier's check comes early enough
    try:
        with torch.device("meta"):
            model = get_peft_model(type(model)(model.config), copy.deepcopy(config))
            needed = get_peft_model_state_dict(model, save_embedding_layers=False)
    except Exception as error:  # those of PEFT are of many kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"The settings in {CONFIG_FILE} do not fit the {type(model).__name__} ({reason}).") from error
    for adapter, tensors in weights.items():
        of_peft = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        check_shapes(of_peft, needed, Path(adapter) / WEIGHTS_FILE)


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a value and inside of it."""
    if isinstance(value, int | float):
        yield abs(value)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _numbers(each)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from _numbers(each)


def check_shapes(tensors: dict[str, torch.Tensor], needed: dict[str, torch.Tensor], path: Path) -> None:
    """Raise a `ValueError` if the tensors of a file are not of these names and shapes, or too large for the dtypes."""
    found, shapes = ({name: list(each.shape) for name, each in state.items()} for state in (tensors, needed))
    for name in sorted(found.keys() | shapes.keys()):
        if found.get(name) != shapes.get(name):
            raise ValueError(
                f"{path} holds {name[-150:]!r} of shape {found.get(name)}, but the classifier's settings and base "
                f"need {shapes.get(name)}; nothing was loaded."
            )
        dtype = needed[name].dtype
        if tensors[name].dtype != dtype and not tensors[name].to(dtype).isfinite().all():
            raise ValueError(f"{path} holds numbers in {name[-150:]!r} that {dtype} has not; nothing was loaded.")

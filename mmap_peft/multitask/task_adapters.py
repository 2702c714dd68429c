"""Which adapters the tasks of a classifier use, and which of them train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from ..tuner.assemble import Route
from .adapters import GLOBAL, AdapterSet
from .class_texts import ClassTexts
from .grouping import TaskGrouping
from .record import TrainingRecord
from .task import Task


class TaskAdapters(nn.Module):
    """The tasks of a classifier, the adapters in its model, and the route of each task. Base of `MultiTaskClassifier`.

    Attributes:
        tasks (`dict[str, Task]`): the tasks by name.
        routes (`dict[str, tuple[str, ...]]`): for each task, the adapters that it uses, in order.
        grouping (`TaskGrouping`, *optional*): the groups, if there are any.
        trained_adapters (`set[str]`): names of the adapters that hold what was learned: those that were loaded, or that
            a training run has begun to train. Nothing but `reset_adapters`, `set_grouping`, `share_one_adapter` and
            `separate_adapters` replaces them.
        record (`TrainingRecord`): how the adapters were trained and how well they do, filled by a trainer.
    """

    tasks: dict[str, Task]
    routes: dict[str, Route]
    grouping: TaskGrouping | None
    trained_adapters: set[str]
    record: TrainingRecord
    texts: ClassTexts
    adapter_set: AdapterSet

    # ---- the model

    @property
    def model(self) -> nn.Module:
        """The CLIP, or the `PeftModel` around it."""
        return self.adapter_set.model

    @property
    def clip(self) -> PreTrainedModel:
        """The CLIP itself."""
        return self.adapter_set.clip

    @property
    def adapter_config(self) -> PeftConfig | None:
        """Settings of the adapters; `None` for zero-shot."""
        return self.adapter_set.config

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters, those of groups first."""
        return self.adapter_set.names

    @property
    def uses_prompts(self) -> bool:
        """Whether the adapters are prompts, of which a task can use several."""
        return self.adapter_set.uses_prompts

    @property
    def base_size(self) -> int:
        """Number of the base's parameters."""
        return self.adapter_set.base_size()

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by name."""
        return self.adapter_set.parameters_of(adapter)

    def adapter_state(self, adapter: str) -> dict[str, torch.Tensor]:
        """The tensors of an adapter's file, by their names there."""
        return self.adapter_set.state_of(adapter)

    def load_adapter_state(self, adapter: str, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `adapter_state`."""
        self.adapter_set.load_state(adapter, tensors)

    def unload(self) -> PreTrainedModel:
        """Take all adapters out and return the CLIP as it was. The classifier cannot be used after that."""
        return self.adapter_set.unload()

    # ---- which adapters train

    def train_adapters(self, adapters: Sequence[str]) -> None:
        """Let exactly these adapters train."""
        self.adapter_set.train_only(adapters)

    @property
    def training_adapters(self) -> list[str]:
        """Names of the adapters that train."""
        return [
            adapter
            for adapter in self.adapters
            if any(parameter.requires_grad for parameter in self.adapter_parameters(adapter).values())
        ]

    @property
    def training_tasks(self) -> list[str]:
        """Names of the tasks that use an adapter which trains."""
        training = set(self.training_adapters)
        return [name for name, route in self.routes.items() if training & set(route)]

    def tasks_by_parameter(self) -> dict[nn.Parameter, list[int]]:
        """For each parameter that trains, the numbers of the tasks that use it."""
        numbers = {name: number for number, name in enumerate(self.tasks)}
        return {
            parameter: [numbers[name] for name, route in self.routes.items() if adapter in route]
            for adapter in self.adapters
            for parameter in self.adapter_parameters(adapter).values()
            if parameter.requires_grad
        }

    # ---- which adapters tasks use

    def set_grouping(self, grouping: TaskGrouping, seed: int = 0) -> None:
        """Give every group and every task an adapter of its own, in place of those that were there.

        A group's prompts start as a copy of the global ones, if there are any (a choice of this library), a task's at
        random. All of them train.

        Args:
            grouping (`TaskGrouping`): a partition of exactly these tasks.
            seed (`int`): seed of the initial values.

        Raises:
            ValueError: the grouping is one of other tasks, or the method has no prompts.
        """
        self.check_grouping()
        if sorted(grouping.tasks) != sorted(self.tasks):
            raise ValueError(
                f"The grouping is one of {sorted(grouping.tasks)}, but the classifier has {sorted(self.tasks)}; make "
                "one of the same tasks."
            )
        shared = self.adapter_parameters(GLOBAL) if GLOBAL in self.adapters else {}
        shared = {name: parameter.detach().clone() for name, parameter in shared.items()}
        groups = {f"group_{number}": members for number, members in enumerate(grouping.groups)}
        self.replace_adapters([*groups, *(task.adapter for task in self.tasks.values())], seed)
        with torch.no_grad():
            for group in groups:
                for name, parameter in self.adapter_parameters(group).items():
                    if name in shared:
                        parameter.copy_(shared[name])
        self.routes = {
            task: (group, self.tasks[task].adapter)
            for task in self.tasks
            for group, members in groups.items()
            if task in members
        }
        self.grouping = grouping

    def check_grouping(self) -> None:
        """Raise a `ValueError` if the method can have no groups."""
        if not self.uses_prompts:
            method = "zero-shot" if self.adapter_config is None else type(self.adapter_config).__name__
            raise ValueError(
                f"A task joins its group's prompts to its own, but {method} has no prompts to join; train without "
                "groups, by MultiTaskTrainer.train() with the default of grouping."
            )

    def share_one_adapter(self, seed: int = 0) -> None:
        """Give all tasks one global adapter, as at the beginning, unless it is that already."""
        if self.adapters != [GLOBAL]:
            self.check_grouping()
            self.replace_adapters([GLOBAL], seed)
            self.routes, self.grouping = dict.fromkeys(self.tasks, (GLOBAL,)), None

    def separate_adapters(self, seed: int = 0) -> None:
        """Give each task an adapter of its own, in place of those that were there, and nothing that tasks share."""
        self.check_grouping()
        self.replace_adapters([task.adapter for task in self.tasks.values()], seed)
        self.routes, self.grouping = {name: (task.adapter,) for name, task in self.tasks.items()}, None

    def replace_adapters(self, names: Sequence[str], seed: int = 0) -> None:
        """New adapters with these names in place of all that were there; all of them train."""
        self.adapter_set.reset(names, seed)
        self.trained_adapters = set()
        self.record.prompted = {}

    # ---- tasks

    def check_new_task(self, task: Task, route: Route) -> None:
        """Raise a `ValueError` if the classifier cannot have this task besides the others."""
        taken = {other.adapter: name for name, other in self.tasks.items()}
        if task.adapter in taken:
            raise ValueError(
                f"Tasks {taken[task.adapter]!r} and {task.name!r} would both have the adapter {task.adapter!r}; "
                "rename one."
            )
        if task.adapter == GLOBAL or task.adapter.startswith("group_"):
            raise ValueError(
                f"Task {task.name!r} would have the adapter {task.adapter!r}, a name that is kept for prompts of "
                "several tasks; rename it."
            )
        contexts = getattr(self.adapter_config, "num_classes", None)
        if contexts not in (None, len(task.class_names)):
            raise ValueError(
                f"Task {task.name!r} has {len(task.class_names)} classes, but num_classes={contexts} contexts were "
                "asked for; give tasks with as many classes, or leave num_classes out."
            )
        self.adapter_set.check_name(task.adapter)
        self.texts.of(task, route)

    def add_task(self, task: Task, group: str | None = None, seed: int = 0) -> None:
        """Teach a trained classifier one more task: from now on only the new task's prompts, or its probe, train.

        The one adapter of any other method goes on training for all tasks, the new one too.

        Args:
            task (`Task`): the task.
            group (`str`, *optional*): the group whose prompts it uses besides its own, or a task of that group.
                `None`: its own alone.
            seed (`int`): seed of the initial values.

        Raises:
            ValueError: no such group, a name that is taken, or a task that cannot be. Nothing has changed then.
        """
        if self.adapter_config is None:
            raise ValueError("A classifier without a config is zero-shot and cannot learn a task; give a config.")
        shared = None if group is None else self._shared_adapter(group)
        route = self.adapter_set.first_route(task.adapter)
        if self.uses_prompts:
            route = (task.adapter,) if shared is None else (shared, task.adapter)
        self.check_new_task(task, route)
        if self.uses_prompts:
            self.adapter_set.add(task.adapter, seed)
        self._enter(task, route)
        if self.grouping is not None:
            groups = [list(members) for members in self.grouping.groups]
            if shared is None or shared == GLOBAL:
                groups.append([task.name])
            else:
                groups[int(shared.removeprefix("group_"))].append(task.name)
            self.grouping = TaskGrouping([*self.grouping.tasks, task.name], groups, mode="given")
        self.train_adapters([task.adapter] if self.uses_prompts else list(route))

    def _shared_adapter(self, group: str) -> str:
        """The adapter that a new task shares with a group, given by the name of the adapter or of a task."""
        self.check_grouping()
        if group not in self.tasks and group not in self.adapters:
            raise ValueError(
                f"{group!r} is no group or task; write one of {', '.join([*self.adapters, *self.tasks])}."
            )
        own = {task.adapter for task in self.tasks.values()}
        shared = [name for name in self.routes.get(group, (group,)) if name not in own]
        if not shared:
            raise ValueError(
                f"{group!r} has no prompts that tasks share; write a group of "
                f"{[name for name in self.adapters if name not in own]} or a task of one, or leave group out."
            )
        return shared[0]

    def _enter(self, task: Task, route: Route) -> None:
        """Take over a task that was checked."""
        raise NotImplementedError

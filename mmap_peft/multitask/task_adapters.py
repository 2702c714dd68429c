"""The adapters that the tasks of a classifier use, and those that train."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from pydantic import InstanceOf
from torch import nn
from transformers import PreTrainedModel

from ..checking import Seed, checked
from ..tuner.assemble import Route
from .adapters import GLOBAL, AdapterSet
from .class_texts import ClassTexts
from .grouping import TaskGrouping
from .inputs import check_contexts, check_task_object
from .nearest_group import NearestGroup, nearest_group
from .record import TrainingRecord
from .task import Task


KEPT_NAMES = (GLOBAL, "mean", "worst")  # the last two: a trainer returns mean_accuracy and worst_accuracy


class TaskAdapters(nn.Module):
    """The tasks of a classifier, the adapters in its model, and the route of each task. Base of `MultiTaskClassifier`.

    Attributes:
        model (`nn.Module`): the CLIP, or the `PeftModel` around it.
        clip (`PreTrainedModel`): the CLIP itself.
        adapter_config (`PeftConfig`, *optional*): settings of the adapters; `None` for zero-shot.
        adapters (`list[str]`): names of the adapters, those of groups first.
        tasks (`dict[str, Task]`): the tasks by name.
        routes (`dict[str, tuple[str, ...]]`): for each task, the adapters that it uses, in order.
        grouping (`TaskGrouping`, *optional*): the groups, if there are any.
        trained_adapters (`set[str]`): names of the adapters that were loaded, or that a training run has begun to
            train. Only `reset_adapters`, `set_grouping`, `share_one_adapter` and `separate_adapters` replace them.
        record (`TrainingRecord`): training settings and accuracies, filled by a trainer.
    """

    tasks: dict[str, Task]
    routes: dict[str, Route]
    grouping: TaskGrouping | None
    trained_adapters: set[str]
    record: TrainingRecord
    texts: ClassTexts
    adapter_set: AdapterSet

    model = property(lambda self: self.adapter_set.model)
    clip = property(lambda self: self.adapter_set.clip)
    adapter_config = property(lambda self: self.adapter_set.config)
    adapters = property(lambda self: self.adapter_set.names)

    @property
    def uses_prompts(self) -> bool:
        """Whether the adapters are prompts, so that a task can use several of them."""
        return self.adapter_set.container is not None

    @property
    def base_size(self) -> int:
        """Number of the base's parameters."""
        return sum(parameter.numel() for parameter in self.adapter_set.text_parameters()[0])

    def adapter_parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter, by name."""
        return self.adapter_set.parameters_of(adapter)

    def adapter_size(self, adapter: str) -> int:
        """Number of an adapter's parameters."""
        return sum(parameter.numel() for parameter in self.adapter_parameters(adapter).values())

    def adapter_state(self, adapter: str) -> dict[str, torch.Tensor]:
        """The tensors of an adapter's file, by their names there."""
        return self.adapter_set.state_of(adapter)

    def load_adapter_state(self, adapter: str, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `adapter_state`; the adapter counts as trained."""
        self.trained_adapters.add(adapter)
        self.adapter_set.load_state(adapter, tensors)

    def unload(self) -> PreTrainedModel:
        """Remove all adapters and return the CLIP as it was. The classifier cannot be used after that."""
        return self.adapter_set.unload()

    def train_adapters(self, adapters: Sequence[str]) -> None:
        """Set exactly these adapters to train."""
        self.adapter_set.train_only(adapters)

    @property
    def training_adapters(self) -> list[str]:
        """Names of the adapters that train."""
        return [name for name in self.adapters if any(p.requires_grad for p in self.adapter_parameters(name).values())]

    @property
    def training_tasks(self) -> list[str]:
        """Names of the tasks that use an adapter which trains, or whose cache is to be filled."""
        training = {*self.training_adapters, *self.adapter_set.empty_caches}
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

    def set_grouping(self, grouping: TaskGrouping, seed: int = 0, keep_global: bool = False) -> None:
        """Replace all adapters by one for each group and one for each task; all of them train.

        The prompts of a group start as a copy of the global ones, if there are any (a choice of this library); those
        of a task are initialized from `seed`. `grouping` must have exactly the classifier's tasks. With `keep_global`,
        every task uses the global prompts, its group's and its own, in this order; those of a group then are
        initialized from `seed`, too.

        Raises:
            ValueError: the grouping has other tasks, the method has no prompts, or a text is too long with the prompts
                of two adapters. Nothing has changed then.
        """
        self.check_grouping()
        checked(grouping, InstanceOf[TaskGrouping], "grouping")
        checked(seed, Seed, "seed")
        checked(keep_global, bool, "keep_global")
        if sorted(grouping.tasks) != sorted(self.tasks):
            raise ValueError(
                f"The grouping is one of {sorted(grouping.tasks)}, but the classifier has {sorted(self.tasks)}; make "
                "one of the same tasks."
            )
        groups = {f"group_{number}": members for number, members in enumerate(grouping.groups)}
        group_of = {task: group for group, members in groups.items() for task in members}
        first = (GLOBAL,) * keep_global
        routes = {name: (*first, group_of[name], task.adapter) for name, task in self.tasks.items()}
        for name, task in self.tasks.items():
            self.texts.of(task, routes[name])  # raises if there is no place for the prompts of several adapters
        shared = copy.deepcopy(self.adapter_parameters(GLOBAL)) if GLOBAL in self.adapters else {}
        self.replace_adapters([*first, *groups, *(task.adapter for task in self.tasks.values())], seed)
        with torch.no_grad():
            for adapter in (first or groups) if shared else ():
                for name, parameter in self.adapter_parameters(adapter).items():
                    parameter.copy_(shared[name])
        self.routes, self.grouping = routes, grouping

    def check_grouping(self) -> None:
        """Raise a `ValueError` if the method cannot have groups."""
        if not self.uses_prompts:
            method = "zero-shot" if self.adapter_config is None else type(self.adapter_config).__name__
            raise ValueError(
                f"A task joins its group's prompts to its own, but {method} has no prompts to join; train without "
                "groups, by MultiTaskTrainer.train() with the default of grouping, and add tasks without a group."
            )

    def share_one_adapter(self, seed: int = 0) -> None:
        """Give all tasks one global adapter, as in a new classifier, unless they have it already."""
        checked(seed, Seed, "seed")
        if self.adapters != [GLOBAL]:
            self.check_grouping()
            self.replace_adapters([GLOBAL], seed)
            self.routes, self.grouping = dict.fromkeys(self.tasks, (GLOBAL,)), None

    def separate_adapters(self, seed: int = 0) -> None:
        """Replace all adapters by one for each task, with none that tasks share."""
        checked(seed, Seed, "seed")
        self.check_grouping()
        self.replace_adapters([task.adapter for task in self.tasks.values()], seed)
        self.routes, self.grouping = {name: (task.adapter,) for name, task in self.tasks.items()}, None

    def replace_adapters(self, names: Sequence[str], seed: int = 0) -> None:
        """Replace all adapters by new ones with these names; all of them train."""
        self.adapter_set.reset(names, seed)
        self.trained_adapters = set()
        self.record.prompted = {}

    def reset_adapters(self, seed: int = 0) -> None:
        """Replace all adapters by those of a new classifier. What was learned is lost."""
        if self.adapter_config is None:
            raise ValueError("A classifier without a config has no adapters to reset; give a config.")
        tasks, self.tasks, self.routes, self.grouping = self.tasks, {}, {}, None
        self.record = TrainingRecord(zero_shot=self.record.zero_shot)
        self.replace_adapters([GLOBAL] if self.adapters == [GLOBAL] or self.uses_prompts else [], seed)
        for task in tasks.values():
            self._enter(task, self.adapter_set.first_route(task.adapter))

    def check_new_task(self, task: Task, route: Route) -> None:
        """Raise a `ValueError` if this task cannot be added to the others."""
        taken = {present.adapter: name for name, present in self.tasks.items()}
        # Older versions left letters such as é out of an adapter's name.
        taken |= {self.routes[name][-1]: name for name in self.tasks if self.routes[name][-1:] not in ((), (GLOBAL,))}
        if task.adapter in taken:
            raise ValueError(
                f"Tasks {taken[task.adapter]!r} and {task.name!r} would both have the adapter {task.adapter!r}; "
                "rename one."
            )
        if task.adapter in KEPT_NAMES or task.adapter.startswith("group_"):
            raise ValueError(
                f"Task {task.name!r} would have the adapter {task.adapter!r}, a name that is kept for prompts of "
                "several tasks, or for their accuracies; rename it."
            )
        check_contexts(task, getattr(self.adapter_config, "num_classes", None))
        self.texts.of(task, route)

    def add_task(self, task: Task, group: str | None = None, seed: int = 0) -> NearestGroup | None:
        """Add a task to a trained classifier. From then on, only its own adapter trains.

        The one adapter of any other method keeps training, for all tasks with the new one.

        Args:
            task (`Task`): the task.
            group (`str`, *optional*): the group whose prompts it uses with its own, or a task of that group;
                `"nearest"`: the group whose prompts fit its training images best. `None`: only its own.
            seed (`int`): seed of the new adapter's initial values.

        Returns:
            For `"nearest"`, the group, how sure the choice is, and the losses that it was chosen by.

        Raises:
            ValueError: no such group, a task without a group, no training images to find the nearest group, or a task
                that does not fit: a name that is taken or kept, or a text that is too long. Nothing has changed then.
        """
        if self.adapter_config is None:
            raise ValueError("A classifier without a config is zero-shot and cannot learn a task; give a config.")
        check_task_object(task)
        checked(group, str | None, "group")
        checked(seed, Seed, "seed")
        nearest = self.nearest_group(task, seed) if group == "nearest" and group not in self.tasks else None
        group = group if nearest is None else nearest.group
        shared = () if group is None else self._shared_route(group)
        route = (*shared, task.adapter) if self.uses_prompts else self.adapter_set.first_route(task.adapter)
        self.check_new_task(task, route)
        if self.uses_prompts:
            self.adapter_set.add(task.adapter, seed)
        self._enter(task, route, seed)
        self.grouping = self._grouping_with(task.name, shared)
        self.train_adapters([route[-1]])
        return nearest

    def nearest_group(self, task: Task, seed: int = 0) -> NearestGroup:
        """The group whose prompts, with no training, fit a task's training images best; `seed` chooses the images.

        Raises:
            ValueError: there are no groups, or the task has no training images.
        """
        self.check_grouping()
        check_task_object(task)
        groups = {name: route for name, route in self.shared_routes().items() if name != GLOBAL}
        if not groups:
            raise ValueError(
                "No group is nearest, since there are none; write group=None, or train with groups first."
            )
        return nearest_group(self, task, groups, seed)

    def shared_routes(self) -> dict[str, Route]:
        """For each group, and for the adapter that all tasks share, what a task's route has before its own adapter."""
        found = {GLOBAL: (GLOBAL,)} if GLOBAL in self.adapters else {}
        shared = [tuple(name for name in route if _is_shared(name)) for route in self.routes.values()]
        return {**found, **{route[-1]: route for route in shared if route}}

    def _shared_route(self, group: str) -> Route:
        """The part of a route that a new task shares with a group, which is given by its name or by a task of it."""
        self.check_grouping()
        groups = self.shared_routes()
        name = group
        if group in self.tasks:
            name = next((each for each in reversed(self.routes[group]) if each in groups), "")
        if name in groups:
            return groups[name]
        if group in self.tasks:
            raise ValueError(
                f"Task {group!r} is in no group, so there are no prompts to share with it; write group=None, for "
                f"prompts of the new task alone{', or one of ' + ', '.join(groups) if groups else ''}."
            )
        raise ValueError(f"{group!r} is no group or task; write one of {', '.join([*groups, *self.tasks])}.")

    def _grouping_with(self, task: str, shared: Route) -> TaskGrouping | None:
        """The grouping with one more task, in the group whose tasks share these adapters, or in a new group."""
        if self.grouping is None:
            return None
        in_group = {name for name, route in self.routes.items() if name != task and route[:-1] == shared != ()}
        groups = [[*members, task] if in_group & set(members) else list(members) for members in self.grouping.groups]
        if not any(task in members for members in groups):
            groups.append([task])
        return TaskGrouping([*self.grouping.tasks, task], groups, mode="given")

    def _enter(self, task: Task, route: Route, seed: int | None = None) -> None:
        """Add a task that was checked."""
        raise NotImplementedError


def _is_shared(adapter: str) -> bool:
    """Whether an adapter is one of several tasks, by its name."""
    return adapter == GLOBAL or adapter.startswith("group_")

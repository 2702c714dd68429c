"""Prediction among other classes, or by other templates, than those of a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..checking import checked, shortened
from ..tuner.fingerprint import autocast_dtype
from .adapters import ClassWeights
from .class_names import Text, Texts, as_list, as_tuple, check_template, clean_names
from .output import Prediction
from .processes import is_sharded
from .task import Task
from .task_forward import TaskForward, check_probabilities
from .task_texts import RoutedTasks
from .text_features import TextFeatureCache


LARGEST_CACHE = 2**24  # elements of the features of other texts that are kept: 64 MB in float32


class Choice(NamedTuple):
    """Class names, in plain words, and templates that are used instead of those of a task; `None`: the task's own."""

    class_names: list[str] | None
    templates: tuple[str, ...] | None

    @classmethod
    def of(cls, class_names: Any, templates: Any) -> Choice | None:
        """Check what `MultiTaskClassifier.predict` was given; `None` if it was given neither.

        Raises:
            ValueError: a value of another type, fewer than two names, names that are the same or empty after cleaning,
                or a template without `{}`.
        """
        if class_names is not None:
            expected = "expected a list of strings, two or more"
            raw = checked(as_list(class_names), list[Text], "class_names", expected)
            if len(raw) < 2:
                raise ValueError(f"Invalid value {shortened(raw)} for `class_names`: {expected}.")
            class_names = clean_names(raw, "The names in `class_names`")
        if templates is not None:
            expected = "expected a string with {} for the class name, or a list of them"
            templates = as_tuple(checked(as_list(templates), Texts, "templates", expected))
            for template in templates:
                check_template(template, " in `templates`")
        return None if class_names is templates is None else cls(class_names, templates)


class TaskClasses(NamedTuple):
    """The classes that images of a task are classified among.

    Attributes:
        task: the task itself, or one of other classes or templates, whose texts must be encoded.
        columns: numbers of the classes among those of `task`, in the order of the answer.
        are_others: whether they are other classes than the task's own, which only their texts tell apart.
    """

    task: Task
    columns: list[int]
    are_others: bool = False

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the answer."""
        return [self.task.class_names[column] for column in self.columns]


class OtherClasses(TaskForward):
    """Prediction of images whose tasks are given. Base of `MultiTaskClassifier`."""

    processor: Any
    _other_texts: TextFeatureCache

    def _predict_given(self, images: Sequence[Any], task: str | Sequence[str], choice: Choice | None) -> Prediction:
        """As `MultiTaskClassifier.predict` with a task, of decoded images."""
        tasks = [task] * len(images) if isinstance(task, str) else list(task)
        if len(tasks) != len(images):
            raise ValueError(
                f"{len(tasks)} tasks were given for {len(images)} images; write one for each image, or one for all."
            )
        for name in dict.fromkeys([task] if isinstance(task, str) else tasks):
            self.check_task(name)
        classes = self._classes([task] if isinstance(task, str) else tasks or self.tasks, choice)
        if not images:
            return Prediction([], torch.zeros(0, max(len(each.columns) for each in classes.values())))
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        probabilities = self.probabilities(pixels, tasks, classes)
        found = zip(tasks, probabilities.argmax(-1).tolist())
        return Prediction([classes[name].class_names[number] for name, number in found], probabilities)

    def probabilities(
        self, pixel_values: torch.Tensor, tasks: Sequence[str], classes: Mapping[str, TaskClasses] | None = None
    ) -> torch.Tensor:
        """Class probabilities of images, whose tasks are given by name, on the CPU: (batch, classes of the one of
        these tasks with most of them). `classes` are those of each task by its name, if not its own. Raises a
        `ValueError` if probabilities are not finite."""
        names, distinct = list(self.tasks), list(dict.fromkeys(tasks))
        classes = classes or self._classes(distinct, None)
        numbers = torch.tensor([names.index(name) for name in tasks], device=self.device)
        with self.evaluating():
            features = self._features({name: classes[name] for name in distinct})
            others = [name for name in distinct if classes[name].are_others]
            logits = self(pixel_values.to(self.device), numbers, text_features=features, others=others).logits
        columns = [torch.tensor(classes[name].columns) for name in distinct]
        columns = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=-1)
        columns = columns[[distinct.index(name) for name in tasks]].to(logits.device)
        logits = logits.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, float("-inf"))
        probabilities = logits.float().softmax(-1).cpu()
        check_probabilities(probabilities)
        return probabilities

    def _classes(self, names: Iterable[str], choice: Choice | None) -> dict[str, TaskClasses]:
        """The classes of each of these tasks. Raises a `ValueError` if one cannot have those that were chosen."""
        return {name: self._classes_of(name, *(choice or (None, None))) for name in names}

    def _classes_of(self, name: str, class_names: list[str] | None, templates: tuple[str, ...] | None) -> TaskClasses:
        task, route, adapters = self.tasks[name], self.current_routes[name], self.adapter_set
        place = {each: number for number, each in enumerate(task.class_names)}
        unknown = [each for each in class_names or () if each not in place]
        instead = "predict inside `with classifier.zero_shot():` with the plain base"
        if templates is not None and not adapters.uses_texts(route):
            raise ValueError(
                f"Task {name!r} has a linear probe, which uses no texts, so `templates` would change nothing; leave "
                f"them out, or {instead}."
            )
        if unknown and not adapters.takes_other_classes(route):
            raise ValueError(
                f"Task {name!r} has no class {shortened(unknown[0])}, and {type(self.adapter_config).__name__} has "
                "parameters for each class by itself, none of which were trained for others; write class_names of the "
                f"task only, {instead}, or train another task, add_task(Task(name, class_names, train=...))."
            )
        if templates is None and not unknown:
            return TaskClasses(task, [place[each] for each in class_names or task.class_names])
        keeps_rows = not (unknown or adapters.weights_from_texts(route))  # those that a probe has for its classes
        of_own = class_names is None or not adapters.takes_other_classes(route) or keeps_rows
        other = task.with_classes(None if of_own else class_names, templates)
        if templates is not None:
            self.texts.check_templates(other, route)
        if is_sharded(self):
            raise ValueError(
                "Other texts than those of the tasks cannot be encoded while FSDP shards the base; save the "
                "classifier, load it in one process, and predict there."
            )
        if of_own:
            return TaskClasses(other, [place[each] for each in class_names or task.class_names])
        return TaskClasses(other, list(range(len(other.class_names))), are_others=True)

    def _features(self, classes: Mapping[str, TaskClasses]) -> dict[str, torch.Tensor] | None:
        """Unit text features of what `classes` holds, or `None` if these are the tasks' own."""
        routes = self.current_routes
        own = {name: (each.task, routes[name]) for name, each in classes.items() if each.task is self.tasks[name]}
        others = {name: (each.task, routes[name]) for name, each in classes.items() if name not in own}
        if not others:
            return None
        return {**dict(zip(own, self._text_features(own))), **dict(zip(others, self._other_features(others)))}

    def _other_features(self, routed: RoutedTasks) -> list[torch.Tensor]:
        """Unit text features of tasks that are not the classifier's, from a cache of limited size."""
        state, texts = (autocast_dtype(self.device), self.adapter_set.enabled), self.texts.without_memory()
        keys = {
            name: (route, tuple(task.class_names), task.template, tuple(task.class_texts.items()), state)
            for name, (task, route) in routed.items()
        }

        def encode(names: list[str]) -> list[torch.Tensor]:
            some = {name: routed[name] for name in names}
            # Copies, so that no part keeps the memory of all.
            return [part.clone() for part in self._encode(some, texts=texts)]

        return self._other_texts(keys, self._fingerprint(), encode)

    def chosen_weights(self, name: str, choice: Choice | None) -> tuple[ClassWeights, TaskClasses]:
        """As `class_weights`, of the classes that were chosen, and these classes."""
        classes = self._classes_of(name, *(choice or (None, None)))
        features = self._features({name: classes})
        routed = {name: (self.tasks[name], self.current_routes[name])}
        weight, bias = self._class_weights(
            routed,
            lambda: self._text_features(routed) if features is None else [features[name]],
            [name] if classes.are_others else (),
        )
        bias = bias[classes.columns] if isinstance(bias, torch.Tensor) else bias
        return (weight[classes.columns], bias), classes

"""Images without a task: which task they belong to, by the mean features of the tasks' training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..checking import Count, checked
from .description import check_shapes
from .frozen_features import FrozenFeatures
from .images import IGNORE_INDEX, TaskImages
from .other_classes import Choice, OtherClasses
from .output import RoutedPrediction
from .processes import is_sharded
from .task import Task
from .task_forward import check_probabilities


LEAST = 0.05  # tasks that are less probable for an image are not computed with their prompts
SCALES = [2 ** (quarter / 4) for quarter in range(41)]  # inverse temperatures that are tried, from 1 to 1024
USUAL_SCALE = 100.0  # of CLIP, if the images cannot tell: those of one task, or one image a task
PREFIX, SCALE = "prototypes.", "scale"  # names of tensors in the file
CHUNK = 1024  # images whose cosines with all prototypes are in memory at a time


@dataclass
class Prototypes:
    """Mean features of the training images of each class of each task, computed by the plain base.

    Args:
        features (`dict[str, torch.Tensor]`): for each task by its name unit vectors, (classes, dim), in float16; zeros
            for a class without training images.
        scale (`float`): inverse temperature of the cosines.
    """

    features: dict[str, torch.Tensor]
    scale: float

    def task_probabilities(self, image_features: torch.Tensor, tasks: Sequence[str]) -> torch.Tensor:
        """P(task | image), (images, tasks), of unit image features of the plain base, (images, dim). Beforehand, all
        tasks are equally probable, and so are the classes of a task."""
        features = [self.features[name] for name in tasks]
        logits = task_logits(cosines(image_features, torch.cat(features)), list(map(len, features)), self.scale)
        return logits.softmax(-1)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of `prototypes.safetensors`."""
        features = {f"{PREFIX}{name}": part.contiguous() for name, part in self.features.items()}
        return {**features, SCALE: torch.tensor(self.scale, dtype=torch.float64)}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], tasks: Mapping[str, Task], dim: int, path: Path
    ) -> Prototypes:
        """The inverse of `to_tensors`.

        Raises:
            ValueError: tensors that are not prototypes of these tasks, by name, of `dim` numbers; it names `path`.
        """
        needed = {SCALE: torch.empty((), dtype=torch.float64, device="meta")}
        for name, task in tasks.items():
            if PREFIX + name in tensors:
                size = len(task.class_names), dim
                needed[PREFIX + name] = torch.empty(size, dtype=torch.float16, device="meta")
        check_shapes(tensors, needed, path)
        for name, tensor in tensors.items():
            norms = tensor.float().norm(dim=-1)
            fits = norms.any() and ((norms == 0) | ((norms - 1).abs() < 0.01)).all()
            if name == SCALE:
                fits = SCALES[0] <= tensor <= SCALES[-1]
            if tensor.dtype != needed[name].dtype or not fits:
                raise ValueError(
                    f"{path} holds {name[-150:]!r} with values that compute_prototypes does not write: expected "
                    "vectors of length 1 or 0 in float16, and a scale of 1 to 1024 in float64; nothing was loaded."
                )
        features = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name != SCALE}
        return cls(features, tensors[SCALE].item())


def cosines(image_features: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """Cosines of unit features with all prototypes, (images, prototypes); -inf for prototypes of zeros."""
    return (image_features @ prototypes.float().T).masked_fill(~prototypes.any(-1), float("-inf"))


def task_logits(cosines: torch.Tensor, sizes: Sequence[int], scale: float) -> torch.Tensor:
    """For each task, which has `sizes` classes, the logarithm of the mean of exp(scale * cosine) over those of its
    classes with a prototype, (images, tasks)."""
    parts = cosines.split(list(sizes), dim=1)
    counts = [part.isfinite().sum(1).clamp(min=1) for part in parts]
    return torch.stack([(scale * part).logsumexp(1) - count.log() for part, count in zip(parts, counts)], dim=1)


def fit_scale(features: torch.Tensor, classes: torch.Tensor, sizes: Sequence[int]) -> float:
    """The scale with which the tasks of training images are most probable, where the prototype of each image's own
    class is that of the class's other images. All tasks count equally.

    Args:
        features (`torch.Tensor`): unit features of the images, (images, dim).
        classes (`torch.Tensor`): number of each image's class among those of all tasks, (images,).
        sizes (`Sequence[int]`): number of classes of each task.
    """
    tasks = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[classes]
    weights, alone = 1 / torch.bincount(tasks)[tasks], torch.bincount(classes)[classes] == 1
    sums, losses = sum_by_class(features, classes, sum(sizes)), torch.zeros(len(SCALES))
    means = F.normalize(sums, dim=-1)
    for rows in torch.arange(len(features)).split(CHUNK):
        own, others = classes[rows], sums[classes[rows]] - features[rows]
        near = cosines(features[rows], means)
        without = (F.normalize(others, dim=-1) * features[rows]).sum(-1).masked_fill(alone[rows], float("-inf"))
        near.scatter_(1, own[:, None], without[:, None])
        for number, scale in enumerate(SCALES):
            loss = -task_logits(near, sizes, scale).log_softmax(-1).gather(1, tasks[rows, None])[:, 0]
            losses[number] += (loss * weights[rows])[loss.isfinite()].sum()  # not of the only image of a task
    return SCALES[int(losses.argmin())] if losses.any() else USUAL_SCALE


def sum_by_class(features: torch.Tensor, classes: torch.Tensor, count: int) -> torch.Tensor:
    """The sum of the features of each class, (count, dim)."""
    return torch.zeros(count, features.shape[1]).index_add(0, classes, features)


def check_features(task: str, features: torch.Tensor) -> None:
    """Raise a `ValueError` if a task has no features of images, or some that are not finite."""
    if not features.isfinite().all():
        raise ValueError(
            f"Features of images of task {task!r} are not finite: the base cannot compute in its dtype; load it in "
            "float32."
        )
    if not len(features):
        raise ValueError(f"No image of task {task!r} can be read; give it images that can.")


class PrototypeRouting(OtherClasses, FrozenFeatures):
    """Finds the tasks of images. Base of `MultiTaskClassifier`.

    Attributes:
        prototypes (`Prototypes`, *optional*): what `compute_prototypes` computed, or a folder held.
    """

    prototypes: Prototypes | None = None

    @torch.no_grad()
    def compute_prototypes(self, batch_size: int = 64, unreadable: str = "refuse") -> None:
        """Compute what `predict(images)` without a task needs, from the tasks' training images: the mean features of
        each class, by the plain base. They are saved and loaded with the adapters, and do not depend on them.
        Images of classes that are not among a task's `classes_for_training` are left out here, too.

        After `add_task`, call it again. Tasks whose training images are not given keep the prototypes that they have;
        the temperature is then kept, too.

        Args:
            batch_size (`int`): number of images that are computed at a time.
            unreadable (`str`): what to do with a file that is no image, `"refuse"` or `"skip"`, as for training.

        Raises:
            ValueError: a task has neither training images nor prototypes, or an image cannot be read. Nothing has
                changed then.
        """
        checked(batch_size, Count, "batch_size")
        old = self.prototypes or Prototypes({}, SCALES[0])
        given = [name for name, task in self.tasks.items() if task.train is not None and len(task.train)]
        for name, task in self.tasks.items():
            if name in given or name not in old.features or not given:
                task.check_training_images()
        tasks, processor = self.tasks.values(), self.processor.image_processor
        images = TaskImages(tasks, "train", processor, unreadable, given, 0)
        features, labels, numbers = self._read(images, batch_size, "Prototypes")
        sizes = [len(task.class_names) for task in tasks]
        classes = labels + (torch.tensor(sizes).cumsum(0) - torch.tensor(sizes))[numbers]
        means = F.normalize(sum_by_class(features, classes, sum(sizes)), dim=-1).half().split(sizes)
        made = {name: part.clone() for name, part in zip(self.tasks, means) if name in given}
        for number, name in enumerate(self.tasks):
            if name in given:
                check_features(name, features[numbers == number])
        kept = {name: part for name, part in old.features.items() if name not in made}
        self.prototypes = Prototypes({**kept, **made}, old.scale if kept else fit_scale(features, classes, sizes))

    def _read(
        self, images: TaskImages, batch_size: int, description: str, rows: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Plain features of all images that can be read, or of those of some rows, with the numbers of their classes
        and tasks. The progress bar has a description."""
        parts = []
        for batch in images.batches(range(len(images)) if rows is None else rows, batch_size, description):
            readable = batch["labels"] != IGNORE_INDEX
            found = self.plain_features(batch["pixel_values"]), batch["labels"], batch["task_ids"]
            parts.append([part[readable] for part in found])
        features, labels, numbers = map(torch.cat, zip(*parts))
        return features, labels, numbers

    def plain_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit image features of the plain base, (images, dim), in float32 on the CPU."""
        with self.evaluating(), self.zero_shot():
            route = torch.zeros(len(pixels), dtype=torch.long, device=self.device)
            return self.image_features(pixels.to(self.device), [()], route).float().cpu()

    def _predict_routed(self, images: Sequence[Any], choice: Choice | None) -> RoutedPrediction:
        """As `MultiTaskClassifier.predict` without a task, of decoded images."""
        tasks, prototypes = self.tasks, self.prototypes  # another thread may add a task meanwhile
        for name in tasks:
            if prototypes is None or name not in prototypes.features:
                raise ValueError(
                    f"Task {name!r} has no prototypes, by which predict(images) finds the tasks of images; call "
                    "compute_prototypes(), or write predict(images, task)."
                )
        names = list(tasks)
        classes = self._classes(names, choice)
        class_names = list(dict.fromkeys(each for name in names for each in classes[name].class_names))
        if not images:
            return RoutedPrediction([], torch.zeros(0, len(class_names)), [], torch.zeros(0, len(names)), class_names)
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        of_tasks = prototypes.task_probabilities(self.plain_features(pixels), names)
        check_probabilities(of_tasks)
        weights = of_tasks.masked_fill(of_tasks < of_tasks.amax(1, keepdim=True).clamp(max=LEAST), 0)
        weights = weights / weights.sum(1, keepdim=True)
        rows, numbers = weights.nonzero(as_tuple=True)
        # No batch is larger than the given one; sharded towers need the same number of batches in all processes.
        size = len(rows) if is_sharded(self) else len(images)
        parts = [
            self.probabilities(pixels[some], [names[number] for number in numbers_of], classes)
            for some, numbers_of in zip(rows.split(size), numbers.split(size))
        ]
        of_classes = [each for part in parts for each in part]
        place = {name: column for column, name in enumerate(class_names)}
        columns = [[place[each] for each in classes[name].class_names] for name in names]
        found = torch.zeros(len(images), len(class_names))
        for row, number, part in zip(rows.tolist(), numbers.tolist(), of_classes):
            found[row, columns[number]] += weights[row, number] * part[: len(columns[number])]
        labels = [class_names[column] for column in found.argmax(-1).tolist()]
        return RoutedPrediction(labels, found, [names[n] for n in of_tasks.argmax(-1).tolist()], of_tasks, class_names)

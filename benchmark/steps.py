"""The kinds of training steps and predictions whose time and memory are compared."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig
from transformers import CLIPConfig, CLIPModel

from mmap_peft.data.pictograms import CLASS_NAMES
from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.multitask.grouping import TaskGrouping
from mmap_peft.multitask.task import Task
from mmap_peft.multitask.task_gradients import task_gradients
from mmap_peft.prompts.mmap import MmAPConfig

from .internals import group_prompts_alone, plain_path, prompt_generators, text_ids
from .replica import CommonPractice
from .timing import Runs


SHAPES = {  # of the text and the vision tower, where they differ from the defaults of CLIPConfig
    "ViT-B/16": ({}, {"patch_size": 16}),
    "tiny": (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
        {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 48, "patch_size": 16},
    ),
}
STEPS = {
    "floor": "the image tower alone, forward and backward to the pixels",
    "step": "ours: forward and backward of `MultiTaskClassifier`, prompts of one group and of each task",
    "images": "its image part: the same with the texts' features given",
    "plain": "the step with prompts inserted as tokens and stripped, and no words shared between texts",
    "practice": "the common practice: a pass a task, prompts as tokens, texts padded to 77 places",
    "truncated": "the same with texts cut after the longest",
    "shared": "ours before tasks are grouped: the group's prompts alone, for all tasks",
    "snapshot": "gradients of each task's loss by these prompts, for affinities",
    "compiled": "ours under `torch.compile`",
}
SERVING = {
    "features": "`clip.get_image_features` of the plain CLIP",
    "classifier": "the same images of mixed tasks through `MultiTaskClassifier`, whose text features are in memory",
}


@functools.cache
def _all_names() -> list[str]:
    words = [name for name in CLASS_NAMES if " " not in name]
    return CLASS_NAMES + [" ".join(some) for size in (2, 3) for some in itertools.permutations(words, size)]


def class_names(count: int) -> list[str]:
    """Distinct names of classes: first those of Pictograms, then pairs and triples of these. In the template "a photo
    of a {}." the first two have 8 to 10 tokens with start and end, as the classes of Office-Home have with CLIP's own
    tokenizer.

    Raises:
        ValueError: `count` is less than 1, or more names than can be made.
    """
    names = _all_names()
    if not 0 < count <= len(names):
        raise ValueError(f"classes={count} cannot be named; write a number from 1 to {len(names)}.")
    return names[:count]


def random_clip(shape: str, tokenizer: Any) -> CLIPModel:
    """A frozen CLIP on the GPU, if there is one. Its weights are random, since times do not depend on them.

    Args:
        shape (`str`): one of `SHAPES`.
        tokenizer: gives the ids of the start, end and padding tokens.
    """
    text, vision = SHAPES[shape]
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    clip = CLIPModel(CLIPConfig(text_config={**text, **tokens}, vision_config=vision))
    return clip.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def precision() -> str:
    """The data type that steps and predictions are computed in on this machine."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


class Setting:
    """A classifier with MmAP whose tasks form one group, and a batch of random images and labels of all tasks. Each
    task uses the prompts of the group and its own.

    Args:
        clip (`CLIPModel`): frozen and without prompts. It stays as it is: the classifier uses a copy of its modules,
            which shares the weights.
        processor: of this CLIP, with a tokenizer.
        batch (`int`): number of images. They belong to the tasks in turn.
        tasks, classes (`int`): number of tasks, and of classes of each.
        config (`PeftConfig`, *optional*): another method, or other settings. Methods without prompts have no groups.
    """

    def __init__(
        self, clip: CLIPModel, processor: Any, batch: int, tasks: int, classes: int, config: PeftConfig | None = None
    ) -> None:
        self.clip = clip
        names = [f"task {number}" for number in range(tasks)]
        base = copy.deepcopy(clip, {id(parameter): parameter for parameter in clip.parameters()})
        task_list = [Task(name, class_names(classes)) for name in names]
        self.classifier = MultiTaskClassifier(base, processor, task_list, config or MmAPConfig())
        if self.classifier.uses_prompts:
            self.classifier.set_grouping(TaskGrouping(names, [names], mode="all"))
        self.parameters = [parameter for parameter in self.classifier.parameters() if parameter.requires_grad]
        size, device = clip.config.vision_config.image_size, clip.device
        self.images = {
            "pixel_values": torch.randn(batch, 3, size, size, device=device),
            "task_ids": torch.arange(batch, device=device) % tasks,
            "labels": torch.randint(classes, (batch,), device=device),
        }

    def steps(self, compiled: bool = False) -> Runs:
        """A function for each of `STEPS`. All but `floor` and `snapshot` return the loss and leave gradients in
        `.grad`. The losses are the same except for `shared`, the gradients except for `shared` and `images`.

        Args:
            compiled (`bool`): with the step under `torch.compile`.
        """
        runs = {
            "floor": self.floor,
            "step": self.step,
            "images": self._image_part(),
            "plain": self.plain,
            "practice": self.practice(truncated=False),
            "truncated": self.practice(truncated=True),
            "shared": self.shared,
            "snapshot": self.snapshot,
        }
        if compiled:
            torch.compiler.reset()  # torch limits how often a function is compiled; earlier settings must not count
            runs["compiled"] = self._compiled()
        return runs

    def floor(self) -> None:
        """Forward and backward of the plain image tower, down to the pixels."""
        pixels = self.images["pixel_values"].detach().requires_grad_()
        with self.autocast():
            features = self.clip.get_image_features(pixels).pooler_output
        features.float().sum().backward()

    def step(self, model: Callable[..., Any] | None = None) -> torch.Tensor:
        """Forward and backward of the classifier, or of `model` in its place."""
        self._clear_gradients()
        with self.autocast():
            loss = (self.classifier if model is None else model)(**self.images).loss
        loss.backward()
        return loss.detach()

    def plain(self) -> torch.Tensor:
        """As `step`, inside `plain_path`."""
        with plain_path(self.classifier.clip):
            return self.step()

    def shared(self) -> torch.Tensor:
        """As `step`, but all tasks use the prompts of the group alone."""
        with group_prompts_alone(self.classifier):
            return self.step()

    def snapshot(self) -> torch.Tensor:
        """Gradients of each task's loss with respect to the prompts of the group, for the same images."""
        with group_prompts_alone(self.classifier), self.autocast():
            return task_gradients(self.classifier, "group_0", [self.images])[0]

    def serving(self) -> Runs:
        """A function for each of `SERVING`."""
        images = {name: self.images[name] for name in ("pixel_values", "task_ids")}

        def without_gradients(run: Callable[[], Any]) -> Callable[[], Any]:
            def call() -> Any:
                with torch.no_grad(), self.autocast():
                    return run()

            return call

        self.classifier.eval()
        return {
            "features": without_gradients(lambda: self.clip.get_image_features(images["pixel_values"])),
            "classifier": without_gradients(lambda: self.classifier(**images)),
        }

    def autocast(self) -> torch.autocast:
        """The context that steps and predictions run in; see `precision`."""
        device = self.clip.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def _image_part(self) -> Callable[[], torch.Tensor]:
        names = list(self.classifier.tasks)
        with torch.no_grad(), self.autocast():
            features = dict(zip(names, self.classifier.encode_texts(names)))

        return lambda: self.step(functools.partial(self.classifier, text_features=features))

    def practice(self, truncated: bool) -> Callable[[], torch.Tensor]:
        """A function that computes the step as `CommonPractice` does."""
        ids = [rows.to(self.clip.device) for rows in text_ids(self.classifier)]
        practice = CommonPractice(self.clip, ids, prompt_generators(self.classifier), truncated)

        def step() -> torch.Tensor:
            self._clear_gradients()
            losses, total = practice.losses(*(self.images[name] for name in ("pixel_values", "task_ids", "labels"))), 0
            for _ in ids:
                with self.autocast():
                    loss = next(losses)
                loss.backward()
                total = total + loss.detach()
            return total

        return step

    def _compiled(self) -> Callable[[], torch.Tensor]:
        model = torch.compile(self.classifier)
        return lambda: self.step(model)

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

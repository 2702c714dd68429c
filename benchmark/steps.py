"""The ways to do a training step and a prediction that are compared."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from mmap_peft.data.pictograms import CLASS_NAMES
from mmap_peft.multitask.affinity import task_gradients
from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.multitask.grouping import TaskGrouping
from mmap_peft.multitask.task import Task
from mmap_peft.prompts.mmap import MmAPConfig

from .internals import given_text_features, group_prompts_alone, plain_path, prompt_generators, text_ids
from .replica import CommonPractice
from .timing import Runs


SHAPES = {  # what differs from CLIPConfig's defaults, of text and vision
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


def class_names(count: int) -> list[str]:
    """So many names of classes: those of Pictograms, then pairs of their words. A "photo of a" one has 8 to 10 tokens
    with start and end, as Office-Home's have for CLIP's own tokenizer.

    Raises:
        ValueError: there are not as many.
    """
    words = [name for name in CLASS_NAMES if " " not in name]
    names = CLASS_NAMES + [" ".join(pair) for pair in itertools.permutations(words, 2)]
    if not 0 < count <= len(names):
        raise ValueError(f"classes={count} cannot be named; write a number from 1 to {len(names)}.")
    return names[:count]


def random_clip(shape: str, tokenizer: Any) -> CLIPModel:
    """A frozen CLIP of random weights, which time does not depend on, on the GPU if there is one.

    Args:
        shape: one of `SHAPES`.
        tokenizer: whose start, end and padding it takes.
    """
    text, vision = SHAPES[shape]
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    clip = CLIPModel(CLIPConfig(text_config={**text, **tokens}, vision_config=vision))
    return clip.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def precision() -> str:
    """What steps and predictions are computed in on this machine."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


class Setting:
    """A batch of images of some tasks, whose prompts are those of one group and their own.

    Args:
        clip (`CLIPModel`): frozen, without prompts. It stays so; the classifier's has the same weights.
        processor: with the tokenizer.
        batch (`int`): images. Tasks take turns, classes and pixels are random.
        tasks (`int`): tasks.
        classes (`int`): classes of each task, the same for all.
        num_prompts (`int`, *optional*): of the group and of each task; `MmAPConfig`'s default if not given.
    """

    def __init__(
        self, clip: CLIPModel, processor: Any, batch: int, tasks: int, classes: int, num_prompts: int | None = None
    ) -> None:
        self.clip = clip
        names = [f"task {number}" for number in range(tasks)]
        config = MmAPConfig() if num_prompts is None else MmAPConfig(num_prompts=num_prompts)
        base = copy.deepcopy(clip, {id(parameter): parameter for parameter in clip.parameters()})
        every = [Task(name, class_names(classes)) for name in names]
        self.classifier = MultiTaskClassifier(base, processor, every, config)
        self.classifier.set_grouping(TaskGrouping(names, [names], mode="all"))
        self.parameters = [parameter for parameter in self.classifier.parameters() if parameter.requires_grad]
        size, device = clip.config.vision_config.image_size, clip.device
        self.images = {
            "pixel_values": torch.randn(batch, 3, size, size, device=device),
            "task_ids": torch.arange(batch, device=device) % tasks,
            "labels": torch.randint(classes, (batch,), device=device),
        }

    def steps(self, compiled: bool = False) -> Runs:
        """Forward and backward of each of `STEPS`. All but floor and snapshot return the loss and leave `.grad`: the
        same ones, but for images and shared."""
        runs = {
            "floor": self.floor,
            "step": self.step,
            "images": self._image_part(),
            "plain": self.plain,
            "practice": self._practice(truncated=False),
            "truncated": self._practice(truncated=True),
            "shared": self.shared,
            "snapshot": self.snapshot,
        }
        if compiled:
            torch.compiler.reset()  # or what it compiled for settings before would count against its limit
            runs["compiled"] = self._compiled()
        return runs

    def floor(self) -> None:
        """The image tower alone."""
        pixels = self.images["pixel_values"].detach().requires_grad_()
        with self.autocast():
            features = self.clip.get_image_features(pixels).pooler_output
        features.float().sum().backward()

    def step(self, model: Callable[..., Any] | None = None) -> torch.Tensor:
        """The classifier's step, or that of `model` in its place."""
        self._clear_gradients()
        with self.autocast():
            loss = (self.classifier if model is None else model)(**self.images).loss
        loss.backward()
        return loss.detach()

    def plain(self) -> torch.Tensor:
        """The classifier's step by the plain path."""
        with plain_path(self.classifier.clip):
            return self.step()

    def shared(self) -> torch.Tensor:
        """The classifier's step with the prompts of the group alone."""
        with group_prompts_alone(self.classifier):
            return self.step()

    def snapshot(self) -> torch.Tensor:
        """Gradients of each task's loss with respect to the prompts of the group, for the same images."""
        with group_prompts_alone(self.classifier), self.autocast():
            return task_gradients(self.classifier, "group_0", [self.images])

    def serving(self) -> Runs:
        """Each of `SERVING`."""
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

        def step() -> torch.Tensor:
            with given_text_features(self.classifier, features):
                return self.step()

        return step

    def _practice(self, truncated: bool) -> Callable[[], torch.Tensor]:
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

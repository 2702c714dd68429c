"""All that the benchmark uses of `mmap_peft` beyond the methods that docs describe. Each use is here, once."""

from __future__ import annotations

import functools
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.multitask.feature_cache import FeatureCache
from mmap_peft.multitask.row_files import RowFiles
from mmap_peft.prompts.base import PromptGenerator
from mmap_peft.tuner.container import prompt_container
from mmap_peft.tuner.images import ImageStates, first_changed_layer, image_states


@contextmanager
def plain_path(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block prompts are inserted as tokens and stripped in every layer, and texts share no words.

    Args:
        model: a model with prompts.
    """
    container = prompt_container(model)
    container.as_tokens = True
    try:
        yield
    finally:
        container.as_tokens = False


def group_prompts_alone(classifier: MultiTaskClassifier) -> AbstractContextManager:
    """Inside the `with` block all tasks use the prompts of the first group and none of their own."""
    return classifier.override_routes(dict.fromkeys(classifier.tasks, ("group_0",)))


def prompt_generators(classifier: MultiTaskClassifier) -> list[list[PromptGenerator]]:
    """For each task the generators of the prompts that it uses, in order."""
    generator = classifier.adapter_set.generator
    return [[generator(adapter) for adapter in classifier.routes[name]] for name in classifier.tasks]


def text_ids(classifier: MultiTaskClassifier) -> list[torch.Tensor]:
    """For each task the tokens of its classes' texts, (classes, tokens)."""
    return [classifier.texts.batch([task], [classifier.routes[name]]).ids for name, task in classifier.tasks.items()]


class KeptStates:
    """What enters the first layer that adapters change, for a batch of images: computed and written to files once, and
    read from them at each call, as in training. The files are deleted with this object.

    Args:
        classifier (`MultiTaskClassifier`): the classifier.
        pixels (`torch.Tensor`): (images, 3, H, W).
    """

    def __init__(self, classifier: MultiTaskClassifier, pixels: torch.Tensor) -> None:
        clip, layer = classifier.clip, first_changed_layer(classifier.clip)
        if not layer:
            raise ValueError("Adapters change the first layer, so nothing can be kept; write first_layer=1 or more.")
        with torch.no_grad():
            one = image_states(clip, pixels[:1], layer)[0]
        name, size = f"benchmark-{os.getpid()}-{id(self)}", one.numel() * one.itemsize
        self._new_files = functools.partial(RowFiles, name, size, max(4e9, 4 * size * len(pixels)))
        self.cache = FeatureCache(name, layer, self._new_files(), tuple(one.shape), one.dtype, one.dtype)
        weakref.finalize(self, shutil.rmtree, self.cache.files.folder, ignore_errors=True)
        self.clip, self.pixels, self.written = clip, pixels, 0
        self.compute()

    def compute(self) -> ImageStates:
        """Compute the states and write them to the files under new keys, as in the first epoch."""
        count, files = len(self.pixels), self.cache.files
        if files.free_bytes < 2 * count * files.row_bytes:
            shutil.rmtree(files.folder)
            self.cache.files = self._new_files()
        self.keys = [(self.written + number).to_bytes(16, "little") for number in range(count)]
        self.written += count
        states = self.cache.compute(self.clip, self.pixels, self.keys, count)
        if not all(key in self.cache.files for key in self.keys):
            raise OSError("There is no space for kept features; free some on the disk of TMPDIR.")
        return ImageStates(self.cache.layer, states)

    def __call__(self) -> ImageStates:
        states = torch.stack([self.cache.get(key) for key in self.keys])
        return ImageStates(self.cache.layer, states.to(self.pixels.device))

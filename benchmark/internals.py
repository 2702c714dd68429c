"""All that the benchmark uses of `mmap_peft` beyond the methods that docs describe. Each use is here, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from mmap_peft.multitask.classifier import MultiTaskClassifier
from mmap_peft.prompts.base import PromptGenerator
from mmap_peft.tuner.container import prompt_container


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

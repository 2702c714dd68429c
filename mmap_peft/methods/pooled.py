"""Base classes of the methods on pooled features, which change nothing inside a CLIP: a module for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import nn

from ..prompts.method import MethodConfig


TextFeatures = Callable[[], torch.Tensor]  # computes the unit text features of a task's classes, (classes, dim)
Weights = tuple[torch.Tensor, torch.Tensor | None]  # (classes, dim), and (classes) or None for zeros


class PooledModule(nn.Module):
    """The adapter of one task, in float32. A method overrides what it changes; this changes nothing: zero-shot.

    Args:
        config (`PooledConfig`): the settings.
        text_features (`torch.Tensor`): unit text features of the task's classes by the plain base, (classes, dim).
    """

    weights_from_texts: ClassVar[bool] = True  # whether `class_weights` are a function of text features alone
    adds_logits: ClassVar[bool] = False  # whether `added_logits` returns any
    keeps_images: ClassVar[bool] = False  # whether it holds the features of the training images

    def __init__(self, config: PooledConfig, text_features: torch.Tensor) -> None:
        super().__init__()

    def chosen_settings(self) -> dict[str, float]:
        """Settings in place of those of the config, by name."""
        return {}

    @property
    def is_empty(self) -> bool:
        """Whether it has a cache of training images, which is still empty."""
        return False

    def image_features(self, features: torch.Tensor) -> torch.Tensor:
        """Changed image features, (images, dim), of those of the CLIP, which are not of unit length."""
        return features

    def class_weights(self, text_features: TextFeatures) -> Weights:
        """The linear classifier of unit image features."""
        return text_features(), None

    def other_class_weights(self, text_features: TextFeatures) -> Weights:
        """The same for any classes, by their texts alone."""
        return self.class_weights(text_features) if self.weights_from_texts else (text_features(), None)

    def added_logits(self, features: torch.Tensor) -> torch.Tensor | None:
        """What is added to the logits of the task's own classes, (images, classes), given unit image features; other
        classes get nothing."""
        return None

    def needed_state(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the names, shapes and dtypes that an adapter's file must have, which holds `found`."""
        return self.state_dict()


class PooledTuner:
    """Registered with PEFT for methods on pooled features. It raises a `ValueError`: they do not change the CLIP."""

    prefix = "pooled_"

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        config = next(iter(peft_config.values())) if isinstance(peft_config, dict) else peft_config
        raise ValueError(
            f"A {config.method.name} works on a CLIP's features and changes nothing in it, so PEFT cannot load it; "
            f"write MultiTaskClassifier(clip, processor, tasks, {type(config).__name__}()), or its from_pretrained."
        )


@dataclass
class PooledConfig(MethodConfig):
    """Settings of a method on pooled features. Each method sets `method` and `module_class`."""

    module_class: ClassVar[type[PooledModule]]
    tuner_class = PooledTuner


def keeps_images(config: PeftConfig | None) -> bool:
    """Whether the adapters of a method hold the features of the training images."""
    return isinstance(config, PooledConfig) and config.module_class.keeps_images

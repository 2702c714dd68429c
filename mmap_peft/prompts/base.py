"""Base classes of the prompt methods: the config, and the generator that computes prompts from its parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from ..checking import shortened
from .method import MethodConfig, Modules


class TowerShape(NamedTuple):
    """Size of one tower: how many encoder layers, and the width of a token."""

    layers: int
    width: int


PromptCount = Annotated[int, Ge(1), Le(1024)]
Depth = Annotated[int, Ge(1), Le(1000)]
FirstLayer = Annotated[int, Ge(0), Le(999)]
Deviation = Annotated[float, Gt(0), Le(100)]  # of initial values; more would overflow


@dataclass
class PromptConfig(MethodConfig):
    """Settings that all prompt methods share.

    Args:
        num_prompts (`int`): number of prompts in each layer of a tower.
        first_layer (`int`): number of the first layer that gets prompts, counted from 0. What the layers before it
            compute does not depend on the prompts.
        depth (`int`, *optional*): number of the layer, counted from 1, after which no layer gets prompts. `None`: all
            layers from `first_layer` on get prompts.
        target_modules (`str`, *optional*): regular expression of the encoder layers that may get prompts. `None`: all
            encoder layers of all towers.
        exclude_modules (`list[str]`, *optional*): modules that `target_modules` matches but that stay as they are.
        modules_to_save (`list[str]`, *optional*): modules of the base that are trained and saved with the prompts.
        probe (`bool`): whether a `MultiTaskClassifier` gives each task a [`TextProbe`], a linear classifier which
            starts as the text features that the prompts make and trains with them. A plain PEFT model ignores it.
        probe_scale (`float`): s of the `TextProbe`. The default was the best of 0.01, 1/30, 0.1 and 0.3 on validation
            images of Pictograms; up to 0.1 they differ by less than a point.
    """

    generator_class: ClassVar[type[PromptGenerator]]
    towers: ClassVar[tuple[str, ...]] = ("text", "vision")  # which towers can get prompts
    needs_all_towers: ClassVar[bool] = False  # whether a model must have all of them, with equal depths
    stays_in_sequence: ClassVar[bool] = False  # whether prompts are tokens that later layers see, too
    # Where class names stand among prompts that replace words. Not annotated, so that only `CoOpConfig` has the field.
    position = "end"

    num_prompts: PromptCount = 4
    first_layer: FirstLayer = 0
    depth: Depth | None = None
    target_modules: Modules = None
    exclude_modules: Modules = None
    modules_to_save: list[str] | None = None
    probe: bool = False
    probe_scale: Annotated[float, Gt(0), Le(1)] = 0.1

    @property
    def placeholders(self) -> int:
        """How many tokens after the first of a text are replaced by prompts."""
        return self.num_prompts if self.stays_in_sequence and "text" in self.towers else 0

    def tower_settings(self, tower: str) -> tuple[int, int | None]:
        """`num_prompts` and `depth` of one tower."""
        return self.num_prompts, self.depth

    def check(self, towers: Mapping[str, TowerShape]) -> None:
        """Raise a `ValueError` if the settings do not fit a model with these towers."""
        missing = set(self.towers) - set(towers)
        if missing and (self.needs_all_towers or missing == set(self.towers)):
            raise ValueError(
                f"{type(self).__name__} puts prompts into the {' and '.join(self.towers)} tower, but the model has "
                f"only {' and '.join(towers)}; give a whole model, or use another method."
            )
        layers = {name: shape.layers for name, shape in towers.items() if name in self.towers}
        self._check_depth("depth", (min if self.needs_all_towers else max)(layers.values()))
        for tower, count in layers.items():
            last = self.tower_settings(tower)[1] or count
            if self.first_layer >= last:
                raise ValueError(
                    f"Invalid value: first_layer={self.first_layer} is none of the first {last} layers of the {tower} "
                    f"tower, counted from 0, which may get prompts; expected at most {last - 1}."
                )

    def _check_depth(self, name: str, layers: int) -> None:
        depth = getattr(self, name)
        if depth is not None and depth > layers:
            raise ValueError(
                f"Invalid value: {name}={depth} is more than the {layers} layers of a tower; expected at most "
                f"{layers}, or None."
            )


class PromptGenerator(nn.Module, ABC):
    """Computes the prompts of one adapter from its parameters. It does not depend on CLIP or on tasks.

    The prompts of layer l are added to the tokens that enter layer l, after the first token. After the layer they are
    removed, or, if the config says `stays_in_sequence`, they stay until those of the next prompted layer replace them.
    `depths` holds for each tower how many layers get prompts, from layer `first_layer` on.

    Args:
        config (`PromptConfig`): the adapter's settings, which fit `towers`.
        towers (`Mapping[str, TowerShape]`): the towers that get prompts, by name (`"text"`, `"vision"`).
    """

    def __init__(self, config: PromptConfig, towers: Mapping[str, TowerShape]) -> None:
        super().__init__()
        # Plain values, not the config: a saved or copied module must not hold a config.
        self.stays_in_sequence, self.position = config.stays_in_sequence, config.position
        self.first_layer = config.first_layer
        self.depths = {
            name: min(config.tower_settings(name)[1] or layers, layers) - self.first_layer
            for name, (layers, _) in towers.items()
        }

    @abstractmethod
    def forward(self, tower: str) -> torch.Tensor:
        """All prompts of a tower, from layer `first_layer` on: (depth, prompts, width), or (depth, classes, prompts,
        width) for text."""


class SequencePromptGenerator(PromptGenerator):
    """Prompts that are parameters themselves: `text_prompts` and `vision_prompts`, (depth, prompts, width) each."""

    def __init__(self, config: SequencePromptConfig, towers: Mapping[str, TowerShape]) -> None:
        super().__init__(config, towers)
        self.init_ids = config.init_ids
        for tower, shape in towers.items():
            prompts = torch.empty(self._size(config, tower, shape.width)).normal_(std=config.init_std)
            self.register_parameter(f"{tower}_prompts", nn.Parameter(prompts))

    def _size(self, config: SequencePromptConfig, tower: str, width: int) -> tuple[int, ...]:
        return self.depths[tower], config.tower_settings(tower)[0], width

    def forward(self, tower: str) -> torch.Tensor:
        return getattr(self, f"{tower}_prompts")

    @torch.no_grad()
    def start_from_words(self, embedding: nn.Embedding) -> None:
        """Set the text prompts of layer 0 to the embeddings of `init_ids`, if there are any."""
        if self.init_ids and "text" in self.depths and not self.first_layer:
            ids = torch.tensor(self.init_ids, device=None if embedding.weight.is_meta else embedding.weight.device)
            self("text")[0].copy_(embedding(ids))


@dataclass
class SequencePromptConfig(PromptConfig):
    """Settings of prompts that stay in the sequence.

    In a text, the prompts of the first layer replace the tokens after the first one and take their position
    embeddings; texts of SigLIP have no start token, so there the first tokens are replaced. A text needs one word for
    each prompt before the class name: `"X X X X cat."` or `"a photo of a cat."` for four prompts. In an image, prompts
    are added after the first token, without position embeddings. The prompts of a deeper layer replace the outputs of
    the prompts of the layer before it.

    Args:
        init_std (`float`): standard deviation of the initial values of the prompts.
        init_ids (`list[int]`, *optional*): token ids, one for each prompt, whose embeddings initialize the text
            prompts of layer 0. `[]`: random values. `None`: random values, but `MultiTaskClassifier` uses the words "a
            photo of a" for up to four prompts. Not used if `first_layer` is above 0.
    """

    generator_class = SequencePromptGenerator
    stays_in_sequence = True

    init_std: Annotated[float, Ge(0), Le(100)] = 0.02
    init_ids: list[Annotated[int, Ge(0)]] | tuple[Annotated[int, Ge(0)], ...] | None = None

    def check_values(self) -> None:
        super().check_values()
        if self.init_ids and len(self.init_ids) != self.num_prompts:
            raise ValueError(
                f"Invalid value: init_ids={shortened(self.init_ids)} are {len(self.init_ids)} words for "
                f"{self.num_prompts} prompts; expected one for each prompt, or [] to start at random."
            )

"""A training step of deep prompts as in published code, for comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel

from mmap_peft.prompts.base import PromptGenerator


class CommonPractice:
    """The losses of `MultiTaskClassifier`, computed as published code does, such as that of MaPLe (Khattak et al.,
    CVPR 2023). It calls the layers of `CLIPModel`, and does not use our tuner.

    * Each task has a forward pass of its own: its images, and the texts of all its classes.
    * Texts are padded so that together with the prompts they fill all positions of the text tower (77 in OpenAI's
      CLIP), since its causal mask has a fixed size there.
    * Prompts are tokens. They are inserted after the first token before the first layer, and replaced before each
      other layer.

    Args:
        clip (`CLIPModel`): frozen, without prompts.
        ids (`Sequence[torch.Tensor]`): for each task, (classes, tokens), padded to its longest text.
        generators (`Sequence[Sequence[PromptGenerator]]`): for each task, the generators of its prompts, in order.
        truncated (`bool`): pad texts to the longest of their task only.
    """

    def __init__(
        self,
        clip: CLIPModel,
        ids: Sequence[torch.Tensor],
        generators: Sequence[Sequence[PromptGenerator]],
        truncated: bool = False,
    ) -> None:
        self.clip, self.ids, self.generators, self.truncated = clip, ids, generators, truncated

    def losses(self, pixels: torch.Tensor, task_ids: torch.Tensor, labels: torch.Tensor) -> Iterator[torch.Tensor]:
        """What each task contributes to the mean cross entropy of a batch: one scalar a task.

        Call `backward` on each before taking the next, so that only one task's pass is in memory at a time.

        Args:
            pixels: (batch, 3, H, W).
            task_ids, labels: (batch,).
        """
        for task, (ids, generators) in enumerate(zip(self.ids, self.generators)):
            rows = task_ids == task
            image = F.normalize(self._image_features(pixels[rows], generators), dim=-1)
            text = F.normalize(self._text_features(ids, generators), dim=-1)
            logits = self.clip.logit_scale.exp() * image @ text.T
            yield F.cross_entropy(logits.float(), labels[rows], reduction="sum") / len(labels)

    def _text_features(self, ids: torch.Tensor, generators: Sequence[PromptGenerator]) -> torch.Tensor:
        tower = self.clip.text_model
        count = sum(generator("text").shape[1] for generator in generators)
        ends = (ids == tower.config.eos_token_id).int().argmax(dim=1)
        padding = tower.config.max_position_embeddings - count - ids.shape[1]
        if padding > 0 and not self.truncated:
            ids = F.pad(ids, (0, padding), value=tower.config.pad_token_id)
        hidden = _run(tower, "text", tower.embeddings(input_ids=ids), generators, is_causal=True)
        hidden = tower.final_layer_norm(hidden)
        return self.clip.text_projection(hidden[torch.arange(len(ids), device=ids.device), ends + count])

    def _image_features(self, pixels: torch.Tensor, generators: Sequence[PromptGenerator]) -> torch.Tensor:
        tower = self.clip.vision_model
        hidden = _run(tower, "vision", tower.pre_layrnorm(tower.embeddings(pixels)), generators)
        return self.clip.visual_projection(tower.post_layernorm(hidden[:, 0]))


def _run(
    tower: nn.Module, name: str, hidden: torch.Tensor, generators: Sequence[PromptGenerator], **kwargs: bool
) -> torch.Tensor:
    """The output of a tower's last layer, (rows, 1 + prompts + tokens, width)."""
    inserted = 0  # number of prompts in `hidden`
    by_layer = torch.cat([generator(name) for generator in generators], dim=1).to(hidden)
    for prompts, layer in zip(by_layer, tower.encoder.layers):
        rows = prompts.expand(len(hidden), -1, -1)
        hidden = layer(torch.cat([hidden[:, :1], rows, hidden[:, 1 + inserted :]], dim=1), None, **kwargs)
        inserted = len(prompts)
    return hidden

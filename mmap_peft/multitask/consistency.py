"""The losses of PromptSRC, which keep features and logits of prompts near those of the frozen CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..tuner.devices import on_device


class Features(NamedTuple):
    """What a forward pass found, with prompts or by the frozen CLIP.

    Attributes:
        texts: unit text features, (classes of all tasks present, dim).
        images: unit image features, (batch, dim), or `None` if no loss needs them.
        logits: (batch, classes of the task with most of them), -inf beyond an image's own classes, or `None`.
    """

    texts: torch.Tensor
    images: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass(frozen=True)
class Consistency:
    r"""The self-consistency losses of PromptSRC. For one image of a task with $C$ classes,

    $$L = \frac{\lambda_t}{C d} \sum_{c=1}^C \lVert g_c - \bar g_c \rVert_1
        + \frac{\lambda_v}{d} \lVert f - \bar f \rVert_1
        + \frac{\lambda_l}{C} \sum_{c=1}^C \bar p_c \log \frac{\bar p_c}{p_c}$$

    with $g_c$ and $f$ the unit text and image features of $d$ elements, $p$ = softmax of the logits (temperature 1
    beside CLIP's own), and a bar for those of the frozen CLIP. $\lambda_t$ = `text`, $\lambda_v$ = `image` and
    $\lambda_l$ = `logits`. $\bar g_c$ is the mean feature of several texts of class $c$, scaled to length 1.

    The loss of a batch is the mean over its images, as that of the cross entropy is. For one task it equals that of
    the authors' code, where each sum over $d$, over $C$ and over the images is a mean. With the distance `"cosine"`,
    $1 - g_c \cdot \bar g_c$ and $1 - f \cdot \bar f$ take the place of $\lVert \cdot \rVert_1 / d$, as in MMRL (Guo
    and Gu, CVPR 2025).

    Source: Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting", ICCV 2023,
    equations 3 to 5, with the weights 25, 10 and 1 and the reductions of its code.

    Args:
        text, image, logits (`float`): weights of the losses.
        frozen_texts (`Mapping[str, torch.Tensor]`): unit text features of each task's classes by the frozen CLIP,
            (classes, dim), by task name.
        distance (`str`): of two features, `"absolute"` or `"cosine"`.
    """

    text: float
    image: float
    logits: float
    frozen_texts: Mapping[str, torch.Tensor]
    distance: str = "absolute"

    @property
    def uses_images(self) -> bool:
        """Whether the images must pass through the frozen CLIP, too."""
        return self.image > 0 or self.logits > 0

    def of_each_image(
        self, prompted: Features, frozen: Features, sizes: Sequence[int], rows: torch.Tensor
    ) -> torch.Tensor:
        """The loss of each image, (batch,), where `rows`, (batch,), numbers tasks with `sizes` classes."""
        losses = prompted.logits.new_zeros(len(rows), dtype=torch.float32)
        if self.text:
            gaps = self._distance(prompted.texts, frozen.texts).split(list(sizes))
            losses = losses + self.text * torch.stack([gap.mean() for gap in gaps])[rows]
        if self.image:
            losses = losses + self.image * self._distance(prompted.images, frozen.images)
        if self.logits:
            classes = on_device(sizes, rows.device)[rows]
            losses = losses + self.logits * divergence(prompted.logits, frozen.logits) / classes
        return losses

    def _distance(self, features: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        features, frozen = features.float(), frozen.float()
        if self.distance == "cosine":
            return 1 - (features * frozen).sum(dim=-1)
        return (features - frozen).abs().mean(dim=-1)


def divergence(logits: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    """KL divergence of the probabilities of `logits` from those of `frozen`, (rows,); both are -inf at the same
    places, which do not count."""
    absent = frozen.isneginf()
    own, target = (each.float().log_softmax(-1).masked_fill(absent, 0) for each in (logits, frozen))
    return (target.exp() * (target - own)).masked_fill(absent, 0).sum(-1)

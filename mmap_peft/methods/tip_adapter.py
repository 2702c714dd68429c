"""Tip-Adapter and Tip-Adapter-F: the similarity of an image to a task's training images adds to its logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from ..prompts.method import Method
from .pooled import PooledConfig, PooledModule


Alpha = Annotated[float, Ge(0), Le(1000)]
Beta = Annotated[float, Gt(0), Le(1000)]


class TipAdapter(PooledModule):
    """A task's cache: `keys`, (classes, shots, dim), where shots are the images of the class with most of them and
    places without an image are zeros, `alpha` and `beta`. `keys` are a parameter with `train_keys`."""

    adds_logits = keeps_images = True

    def __init__(self, config: TipAdapterConfig, text_features: torch.Tensor) -> None:
        super().__init__(config, text_features)
        keys = text_features.new_zeros(len(text_features), 0, text_features.shape[1], dtype=torch.float32)
        self.keys = nn.Parameter(keys) if config.train_keys else nn.Buffer(keys)
        self.alpha, self.beta = (nn.Buffer(keys.new_tensor(value)) for value in (config.alpha, config.beta))

    def chosen_settings(self) -> dict[str, float]:
        return {"alpha": round(self.alpha.item(), 6), "beta": round(self.beta.item(), 6)}

    @property
    def is_empty(self) -> bool:
        return not self.keys.shape[1]

    def added_logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.alpha * self.sums(self.cosines(features), self.beta)

    def cosines(self, features: torch.Tensor) -> torch.Tensor:
        """Of unit image features with the keys, (images, classes, shots)."""
        return (features.float() @ self.keys.float().flatten(0, 1).T).unflatten(1, self.keys.shape[:2])

    def sums(self, cosines: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
        """The sum over the images of each class of exp(-beta (1 - cosine)), (images, classes)."""
        filled = self.keys.detach().abs().sum(-1) > 0
        return ((beta * (cosines - 1)).exp() * filled).sum(-1)

    @torch.no_grad()
    def fill(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Replace the cache by unit features of images, (images, dim), with their classes' numbers, (images,)."""
        counts, order = labels.bincount(minlength=len(self.keys)), labels.argsort(stable=True)
        sorted_labels = labels[order]
        places = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[sorted_labels]
        keys = torch.zeros(len(self.keys), int(counts.max()), features.shape[1])
        keys[sorted_labels, places] = features[order]
        self.load_state_dict({**self.state_dict(), "keys": keys})

    def needed_state(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        classes, shots, dim = self.keys.shape
        keys = found.get("keys")
        if keys is not None and keys.dim() == 3:  # the file decides how many images a class has
            shots = keys.shape[1]
        return {**self.state_dict(), "keys": torch.empty(classes, shots, dim, device="meta")}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As for any module; the cache may hold another number of images."""
        classes, shots, dim = self.keys.shape
        if (shots := state_dict["keys"].shape[1]) != self.keys.shape[1]:
            with torch.inference_mode(False):  # parameters that are made in inference mode cannot train
                keys = torch.zeros(classes, shots, dim, device=self.keys.device)
                trains = self.keys.requires_grad
                self.keys = nn.Parameter(keys, trains) if isinstance(self.keys, nn.Parameter) else nn.Buffer(keys)
        return super().load_state_dict(state_dict, *args, **kwargs)


@dataclass
class TipAdapterConfig(PooledConfig):
    r"""Settings of Tip-Adapter and Tip-Adapter-F: task t classifies a unit image feature $x$ of the CLIP by

    $$\tau T_t x + \alpha \exp(-\beta (1 - x K_t^\top))\, V_t$$

    where $T_t$ are the unit text features of its classes, $\tau$ is CLIP's temperature (100 in the paper), $K_t$
    (images, dim) are the unit features of all its training images, and $V_t$ (images, classes) are their labels,
    one-hot. The cache is computed by `MultiTaskClassifier.fill_caches`, or at the start of `MultiTaskTrainer.train`;
    until then it is empty, which is zero-shot. It is in float32, with as many places for each class as the class with
    most images has: `classes * shots * dim * 4` bytes, 2 MB for 65 classes of 16 images and a ViT-B/16.

    With `train_keys` the keys train, from their start in the cache: Tip-Adapter-F. Its authors use AdamW with a
    learning rate of 1e-3, `adam_epsilon=1e-4`, a weight decay of 0.01 and no clipping, for 20 epochs of batches of 256
    cropped and flipped images (`augment="crop+flip"`), with a cosine schedule, and keep the epoch that is best on test
    images, which this library does not do.

    The defaults of alpha and beta are the authors' for ImageNet; `MultiTaskClassifier.choose_cache_scales` searches
    them on validation images. The authors' keys are the mean features of 10 random crops of an image; here an image is
    prepared once, as for evaluation.

    Among other classes than the task's own, by their names, all are told apart by their texts alone: a class with
    images would always win over one without. The task's own classes, or some of them, keep their images; so among
    them, a class without training images, such as one that is not in `classes_for_training`, hardly ever wins.

    Source: Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022, section
    3, and the authors' code for the settings.

    Args:
        train_keys (`bool`): whether the keys train.
        alpha (`float`): the weight of the cache, before `choose_cache_scales`.
        beta (`float`): its sharpness, above 0, before `choose_cache_scales`; keys train with both as they are.
    """

    method = Method(
        "TIP_ADAPTER",
        "Tip-Adapter",
        1e-3,
        "Zhang et al., Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification, ECCV 2022",
    )
    module_class = TipAdapter

    train_keys: bool = False
    alpha: Alpha = 1.17
    beta: Beta = 1.0

"""Training arguments against overfitting: losses that keep adapters near the frozen CLIP, the average over the epochs,
and a probe that trains after the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from transformers.hf_argparser import HfArg

from ..checking import checked


FROZEN_TEXTS, DISTANCES = ("ensemble", "task"), ("absolute", "cosine")
_Weight, _Share = Annotated[float, Ge(0), Le(1e6)], Annotated[float, Ge(0), Le(1)]
_KINDS = {
    **dict.fromkeys(("text_consistency", "image_consistency", "logit_consistency"), _Weight | None),
    "frozen_texts": Literal[FROZEN_TEXTS] | None,
    "feature_distance": Literal[DISTANCES] | None,
    "average_mean": _Share | None,
    "average_std": Annotated[float, Gt(0), Le(100)],
    "probe_after": Annotated[float, Gt(0), Lt(1)] | None,
}


class Regularization(NamedTuple):
    """The values of `RegularizationArguments` for a method. The defaults are those of most methods."""

    text_consistency: float = 0.0
    image_consistency: float = 0.0
    logit_consistency: float = 0.0
    frozen_texts: str = "ensemble"
    feature_distance: str = "absolute"
    average_mean: float = 0.0


@dataclass
class RegularizationArguments:
    """Part of `MultiTaskTrainingArguments`. `Consistency` and `AdapterAverage` have the formulas.

    Source: PromptSRC (Khattak et al., ICCV 2023). Its code has the weights 25, 10 and 1, and a Gaussian of mean 15 and
    deviation 1 for 20 epochs, here 0.75 and 0.05; for 50 epochs of few images 30 and 30 (0.6, 0.6) or 45 and 5 (0.9,
    0.1). `PromptSRCConfig` has the first ones by default. `MMRLTokensConfig` has the weights 1 and 1 of MMRL (Guo and
    Gu, CVPR 2025), with cosines. All other methods have none of these losses and no average. `probe_after` is from
    2SFS (Farina et al., CVPR 2025); docs/methods.md says what differs.
    """

    text_consistency: float | None = HfArg(
        default=None,
        help="Weight of the mean distance of a task's text features to those of the frozen CLIP; 25 in PromptSRC. "
        "None: that of the method, 0 but for PromptSRC and MMRL tokens. It needs prompts.",
    )
    image_consistency: float | None = HfArg(
        default=None,
        help="The same of image features; 10 in PromptSRC. It takes another forward pass of the images.",
    )
    logit_consistency: float | None = HfArg(
        default=None,
        help="Weight of the divergence of the class probabilities from those of the frozen CLIP, divided by the "
        "number of classes; 1 in PromptSRC. It takes another forward pass of the images, the same one.",
    )
    frozen_texts: str | None = HfArg(
        default=None,
        help="The texts of the frozen CLIP in these losses. 'ensemble': 60 templates, as in PromptSRC; 'task': those "
        "of the task, as in MMRL. Texts that the task has for single classes stay. None: those of the method, "
        "'ensemble' but for MMRL tokens.",
        metadata={"choices": list(FROZEN_TEXTS)},
    )
    feature_distance: str | None = HfArg(
        default=None,
        help="Distance of two features. 'absolute': mean absolute difference of their elements, as in PromptSRC; "
        "'cosine': one minus their cosine, as in MMRL. None: that of the method, 'absolute' but for MMRL tokens.",
        metadata={"choices": list(DISTANCES)},
    )
    average_mean: float | None = HfArg(
        default=None,
        help="Training results in the mean of the adapters after each epoch, weighted by a Gaussian. Its mean, as a "
        "share of the epochs: 0.75 in PromptSRC, epoch 15 of 20. 0: no average. None: that of the method, 0 but for "
        "PromptSRC.",
    )
    average_std: float = HfArg(
        default=0.05,
        help="Standard deviation of this Gaussian, as a share of the epochs: 0.05 in PromptSRC, 1 of 20 epochs.",
    )

    probe_after: float | None = HfArg(
        default=None,
        help="Share of the steps, between 0 and 1, that train the prompts alone; in all later steps only the probes "
        "train, from the text features that the prompts then make. 0.6 in 2SFS. It needs probe=True. None: both train "
        "together from the start.",
    )

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            checked(getattr(self, name), kind, name)
        super().__post_init__()

    def regularization(self, config: Any) -> Regularization:
        """The values for a method, given by the config of its adapters: the arguments, or else the method's own."""
        of_method = getattr(getattr(config, "method", None), "training", {})
        given = {name: getattr(self, name) for name in Regularization._fields}
        return Regularization(**{**of_method, **{name: each for name, each in given.items() if each is not None}})

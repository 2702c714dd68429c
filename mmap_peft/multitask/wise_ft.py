"""WiSE-FT: tuned parameters on the way between the base and what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le, MinLen
from pydantic import InstanceOf
from torch import nn

from ..checking import checked
from ..methods.parameters import ParameterConfig
from ..tuner.container import bracketed
from .adapters import GLOBAL
from .classifier import MultiTaskClassifier
from .task_trainer import TaskTrainer


Share = Annotated[float, Ge(0), Le(1)]
ALPHAS = tuple(number / 10 for number in range(11))
ALPHA = "wise_ft_alpha"  # in the record of training


@torch.no_grad()
def wise_ft(classifier: MultiTaskClassifier, alpha: float = 0.5) -> None:
    r"""Replace the adapter of full fine-tuning or BitFit by an interpolation with the base,

    $$\theta = (1 - \alpha) \, \theta_0 + \alpha \, \theta_1$$

    with $\theta_0$ the base's parameters and $\theta_1$ the adapter's. 0 is zero-shot and 1 the adapter as it is, both
    to the bit. The adapter is saved and loaded as before; the training record, which the model card shows, holds
    `wise_ft_alpha`. After a second call, the adapter is at the product of both `alpha`.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, equation 1. They tune the image tower
    and a linear classifier that starts as the text features; here all parameters that the adapter has are
    interpolated, by default those of both towers.

    Args:
        classifier (`MultiTaskClassifier`): a classifier with `FullFineTuningConfig`, `BitFitConfig` or another
            `ParameterConfig`.
        alpha (`float`): 0 to 1. The authors recommend 0.5 if nothing is known of the images to come;
            `choose_wise_ft_alpha` compares several.

    Raises:
        ValueError: the classifier has another method or none, `alpha` is out of range, or the base is offloaded.
            Nothing has changed then.
    """
    checked(alpha, Share, "alpha")
    for base, tuned in _pairs(classifier):
        if alpha == 0:
            tuned.copy_(base)
        elif alpha < 1:
            tuned.copy_(base.float().lerp(tuned.float(), alpha))
    record = classifier.record
    record.settings = {**record.settings, ALPHA: alpha * record.settings.get(ALPHA, 1.0)}
    record.prompted = {}  # of other weights


def choose_wise_ft_alpha(trainer: TaskTrainer, alphas: Sequence[float] = ALPHAS) -> dict[float, float]:
    """Evaluate a trained adapter at each `alpha` of `wise_ft`, and leave it at the best; of equals, at the first.

    It is evaluated on the trainer's evaluation images. They must be validation images: if they are the test images,
    their accuracy says nothing about other images any more.

    Args:
        trainer (`TaskTrainer`): a trainer of the classifier, with validation images in `eval_dataset` or as `eval` of
            the tasks.
        alphas (`Sequence[float]`): values from 0 to 1 to choose from.

    Returns:
        `eval_mean_accuracy` for each `alpha`.

    Raises:
        ValueError: as for `wise_ft`, or there is no `alpha`. The adapter is as it was then.
    """
    checked(alphas, Annotated[list[Share] | tuple[Share, ...], MinLen(1)], "alphas")
    checked(trainer, InstanceOf[TaskTrainer], "trainer")
    classifier, accuracies = trainer.model, {}
    settings = classifier.record.settings
    trained = [tuned.detach().clone() for _, tuned in _pairs(classifier)]

    def restore() -> None:
        classifier.record.settings = settings
        with torch.no_grad():
            for (_, tuned), values in zip(_pairs(classifier), trained):
                tuned.copy_(values)

    try:
        for alpha in alphas:
            wise_ft(classifier, alpha)
            accuracies[alpha] = trainer.evaluate()["eval_mean_accuracy"]
            restore()
    except BaseException:
        restore()
        raise
    wise_ft(classifier, max(accuracies, key=lambda alpha: accuracies[alpha]))
    return accuracies


def _pairs(classifier: MultiTaskClassifier) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The base's and the adapter's value of each tuned parameter."""
    checked(classifier, InstanceOf[MultiTaskClassifier], "classifier")
    config = classifier.adapter_config
    if not isinstance(config, ParameterConfig):
        method = "a zero-shot classifier" if config is None else f"a classifier with {type(config).__name__}"
        raise ValueError(
            "WiSE-FT interpolates between values of the base's own parameters, of full fine-tuning or BitFit, but "
            f"{method} has none of these: prompts, probes and low-rank updates have no value in the base. Give a "
            "classifier that was trained with FullFineTuningConfig() or BitFitConfig()."
        )
    container = classifier.clip.tuned
    copies = container.copies([bracketed(GLOBAL)])
    pairs = [(module._parameters[name], copies[key]) for key, (module, name) in container.places.items()]
    if any(parameter.is_meta for pair in pairs for parameter in pair):
        raise ValueError("The base is offloaded, so WiSE-FT cannot read its parameters; load it without offloading.")
    return pairs

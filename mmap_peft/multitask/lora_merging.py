r"""TIES merging: LoRA adapters of several tasks, each trained alone, become the one adapter of a classifier.

For each weight matrix, let $\tau_t = s_t B_t A_t$ be the update of classifier t with its scale $s_t$. Element by
element, the merged update is

$$\hat\tau_t = \tau_t \text{ where } |\tau_t| \text{ is among its largest, else } 0, \quad
\gamma = \mathrm{sign} \sum_t \hat\tau_t, \quad
\tau = \frac{1}{|T|} \sum_{t \in T} \lambda_t \hat\tau_t, \quad T = \{t : \mathrm{sign}\, \hat\tau_t = \gamma\}$$

(trim, elect sign, disjoint mean), with `density` the share of the largest elements and $\lambda_t$ = `weights`. The
merged adapter is its best approximation of rank `rank`, from its singular values.

Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, for whole models. The
authors' scripts keep 20 % and try $\lambda$ from 0.8 to 2.5, the same for all. They trim all parameters of a task
together; here each matrix is trimmed by itself, as PEFT's `add_weighted_adapter` does, which computes all this with
`"ties_svd"`. Its `"ties"` merges A and B by themselves, whose signs mean nothing: $(M A, B M^{-1})$ is the same
update. The approximation, and a $\lambda_t$ for each classifier, which the election of signs leaves out, are no part
of the paper.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel

from ..checking import checked, shortened
from ..export.merging import merged
from ..prompts.method import Rank, Scale
from ..tuner.container import bracketed
from .adapters import GLOBAL
from .base_record import BaseRecord
from .classifier import MultiTaskClassifier
from .peft_adapters import PeftSet
from .record import TrainingRecord, versions
from .task import Task


Density = Annotated[float, Gt(0), Le(1)]
Weights = Scale | list[Scale] | tuple[Scale, ...]
# Settings of LoRA that adapters may have: the update stays B A, times a number, of a base that has not changed.
_MERGEABLE = {field.name for field in fields(PeftConfig)} | {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
}
_BASE_UNCHANGED = (True, False, "gaussian", "orthogonal")  # `init_lora_weights` that leave the base's weights alone


@dataclass
class _Part:
    """What is kept of a classifier: its tasks and its LoRA adapter."""

    tasks: list[Task]
    config: LoraConfig
    state: dict[str, torch.Tensor]
    zero_shot: dict[str, float]


def merge_lora(
    classifiers: Iterable[MultiTaskClassifier],
    density: float = 0.2,
    weights: float | list[float] | tuple[float, ...] = 1.0,
    rank: int | None = None,
) -> MultiTaskClassifier:
    """Merge the LoRA adapters of several classifiers into one of all their tasks, by TIES: the formula is in the head
    of this file. Nothing is trained, and prototypes are not taken over.

    Args:
        classifiers (`Iterable[MultiTaskClassifier]`): classifiers with LoRA of the same modules on the same base;
            ranks and scales may differ. They are not changed. From a generator, one is in memory at a time.
        density (`float`): share of the elements of each update that is kept, above 0 and up to 1.
        weights (`float` or `list[float]`): lambda, above 0, or one for each classifier. Choose it on validation
            images.
        rank (`int`, *optional*): rank of the merged adapter. `None`: the sum of the adapters' ranks, so that it is as
            large as all of them together (a choice of this library).

    Returns:
        A classifier whose adapter `global` all tasks share. It is saved, loaded, trained and exported as any other.

    Raises:
        ValueError: no classifier, one without LoRA or with a variant of it that is no plain product, different bases
            or modules, two tasks of the same name, or a setting out of range.
    """
    checked(density, Density, "density")
    checked(weights, Weights, "weights")
    checked(rank, Rank | None, "rank")
    parts, base, processor, text_chunk = _take(classifiers, density, rank)
    scales = [weights] * len(parts) if isinstance(weights, int | float) else list(weights)
    if len(scales) != len(parts):
        raise ValueError(
            f"{len(scales)} weights were given for {len(parts)} classifiers; write one for each, or one for all."
        )
    rank = rank or min(_largest_rank(parts[0]), sum(max(len(a) for a, _ in _pairs(part.state)) for part in parts))
    state = _merged_state(base, parts, scales, density, rank)
    tasks, config = [task for part in parts for task in part.tasks], _plain(parts[0].config, rank)
    classifier = MultiTaskClassifier(base, processor, tasks, config, text_chunk=text_chunk)
    classifier.load_adapter_state(GLOBAL, state)
    classifier.record = TrainingRecord(
        settings={"ties_density": density, "ties_weights": str(weights)},
        versions=versions(),
        zero_shot={name: accuracy for part in parts for name, accuracy in part.zero_shot.items()},
    )
    return classifier.eval()


def _take(
    classifiers: Iterable[MultiTaskClassifier], density: float, rank: int | None
) -> tuple[list[_Part], PreTrainedModel, Any, int | None]:
    """The parts of the classifiers; and a copy of the base, the processor and `text_chunk` of the first."""
    if isinstance(classifiers, MultiTaskClassifier | str | Mapping) or not hasattr(classifiers, "__iter__"):
        raise ValueError(
            f"Invalid {type(classifiers).__name__} for `classifiers`: expected a list or generator of classifiers."
        )
    parts, first = [], None
    for number, classifier in enumerate(classifiers):
        _check(classifier, number)
        record = BaseRecord.of(classifier)
        if first is None:
            first = record
            shared = merged(classifier.model, used=False), classifier.processor, classifier.text_chunk
        elif record.weights != first.weights or first.differences_of(classifier.processor.image_processor):
            what = "weights of the base" if record.weights != first.weights else "settings of the image processor"
            raise ValueError(
                f"classifiers[{number}] has other {what} than classifiers[0]; merge adapters that were trained on the "
                "same base."
            )
        state = {name: tensor.clone() for name, tensor in classifier.adapter_state(GLOBAL).items()}
        config: Any = classifier.adapter_set.config_of(GLOBAL)
        parts.append(_Part(list(classifier.tasks.values()), replace(config), state, dict(classifier.record.zero_shot)))
        if number == 0:  # before a generator trains the next one
            _check_sizes(parts[0], density, rank)
        if state.keys() != parts[0].state.keys():
            raise ValueError(
                f"classifiers[{number}] has LoRA of other modules than classifiers[0]; train adapters with the same "
                "target_modules."
            )
    if first is None:
        raise ValueError("No classifier was given to merge; give a list with one or more.")
    return parts, *shared


def _check(classifier: Any, number: int) -> None:
    """Raise a `ValueError` if this is no classifier with a LoRA adapter that is a plain product."""
    name = f"classifiers[{number}]"
    if not isinstance(classifier, MultiTaskClassifier):
        raise ValueError(f"Invalid value {shortened(classifier)} for `{name}`: expected a MultiTaskClassifier.")
    config = classifier.adapter_config
    if type(config) is not LoraConfig:
        method = "no adapter" if config is None else f"an adapter of {type(config).__name__}"
        raise ValueError(f"{name} has {method}, but only LoRA adapters can be merged; train it with lora_config().")
    plain = LoraConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        if (field.name not in _MERGEABLE and value != getattr(plain, field.name)) or (
            field.name == "init_lora_weights" and value not in _BASE_UNCHANGED
        ):
            raise ValueError(
                f"{name} has {field.name}={shortened(value)}, so its update is not the product of two matrices alone, "
                "or not of the plain base; train it without this setting to merge it."
            )


def _check_sizes(part: _Part, density: float, rank: int | None) -> None:
    """Raise a `ValueError` if no element of an update would be kept, or a matrix has no such rank."""
    smallest = min(len(b) * a[0].numel() for a, b in _pairs(part.state))
    if not int(density * smallest):
        raise ValueError(
            f"density={density} keeps none of the {smallest} elements of the smallest update; write "
            f"{2 / smallest:.1g} or more."
        )
    if rank is not None and rank > (largest := _largest_rank(part)):
        raise ValueError(f"rank={rank} is larger than the smallest of the merged matrices; write {largest} or less.")


def _largest_rank(part: _Part) -> int:
    return min(min(len(b), a[0].numel()) for a, b in _pairs(part.state))


def _plain(config: LoraConfig, rank: int) -> LoraConfig:
    """The settings of an adapter whose update is B A, with a scale of 1."""
    unset = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    return replace(config, r=rank, lora_alpha=rank, inference_mode=False, **unset)


def _pairs(state: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The matrices A and B of each update."""
    return [(a, state[_of_b(name)]) for name, a in state.items() if name != _of_b(name)]


def _of_b(name: str) -> str:
    """The name of matrix B for the name of matrix A."""
    return name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")


def _merged_state(
    base: PreTrainedModel, parts: list[_Part], scales: list[float], density: float, rank: int
) -> dict[str, torch.Tensor]:
    """The tensors of the merged adapter, made by PEFT. The base is as it was afterwards."""
    names = [GLOBAL, *(f"part_{number}" for number in range(1, len(parts)))]
    modules = parts[0].config.target_modules  # PEFT cannot join a list of names and an expression
    configs = [replace(part.config, target_modules=modules, init_lora_weights=True) for part in parts]
    adapters = PeftSet(base, configs[0], seed=0)
    for name, config in zip(names[1:], configs[1:]):
        adapters.model.add_adapter(bracketed(name), config)
    for name, part in zip(names, parts):
        adapters.load_state(name, part.state)
    if len(parts) == 1:  # PEFT does not trim a single adapter; the disjoint mean of two equal ones is the same
        names, scales = names * 2, scales * 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density .* no pruning")
        adapters.model.add_weighted_adapter(
            list(map(bracketed, names)),
            scales,
            bracketed("merged"),
            combination_type="ties_svd",
            svd_rank=rank,
            svd_full_matrices=False,
            density=density,
        )
    state = {name: tensor.clone() for name, tensor in adapters.state_of("merged").items()}
    adapters.unload()
    return state

"""A trainer with the losses and the average of PromptSRC, for any method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput

from .averaging import AdapterAverage
from .consistency import Consistency
from .output import task_losses
from .probe_stages import ProbeStages
from .regularization_arguments import Regularization, RegularizationArguments
from .templates import TEMPLATES


class RegularizedTrainer(ProbeStages):
    """Adds consistency losses to that of the classifier, and averages adapters over the epochs, as the arguments or
    the method say: see `RegularizationArguments`.

    Evaluation has the cross entropy only. While there is an average, what is evaluated and saved is the average. A
    checkpoint also holds the adapters that training goes on with. So `load_best_model_at_end` loads the average that
    was evaluated best.

    Attributes:
        average (`AdapterAverage`): the average so far.
    """

    sampler: Any
    keeps_adapters: bool

    def __init__(self, **kwargs: Any) -> None:
        model, args = kwargs["model"], kwargs["args"]
        self._regularization = regularization = args.regularization(model.adapter_config)
        _check(regularization, model.adapter_config, args)
        self._consistency: Consistency | None = None
        self.average = AdapterAverage(model, 0.0, 1.0)
        super().__init__(**kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        self._consistency = self._make_consistency(self.model.training_tasks)
        if not resume_from_checkpoint:
            self.average = self._new_average()
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            self.average.finish()
        finally:
            self._consistency, self.average.values = None, {}
        return result

    def _make_consistency(self, tasks: Sequence[str]) -> Consistency | None:
        weights = self._regularization[:3]
        if not any(weights):
            return None
        templates = TEMPLATES if self._regularization.frozen_texts == "ensemble" else None
        try:
            features = self.model.frozen_text_features(tasks, templates)
            return Consistency(*weights, features, self._regularization.feature_distance)
        except ValueError as error:
            if templates is None:
                raise
            raise ValueError(f"{error} Or write frozen_texts='task', without the templates of CLIP.") from error

    def _new_average(self) -> AdapterAverage:
        # Stage 1 is too short for it, and its adapter only initializes others.
        mean = self._regularization.average_mean if self.keeps_adapters else 0.0
        return AdapterAverage(self.model, mean, self.args.average_std)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._consistency is not None and torch.is_grad_enabled():
            inputs = {**inputs, "consistency": self._consistency}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def losses_by_task(self, outputs: dict[str, Any], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The part of each task in the loss, (tasks,)."""
        losses = task_losses(outputs["logits"], inputs["labels"], inputs["task_ids"], len(self.model.tasks))
        return losses + outputs["consistency"] if "consistency" in outputs else losses

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before the step is evaluated or saved; at the end of an epoch it would be after that.
        step, steps = state.global_step, self.sampler.steps
        if step % steps == 0 or step == state.max_steps:
            self.average.add(-(-step // steps), -(-state.max_steps // steps))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.average.in_use():
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self.average.in_use():
            super().save_model(output_dir, _internal_call)
            if self._partial and self.args.should_save:
                self.average.save(Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.average.in_use():  # it is pushed, too
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.average = self._new_average()
        self.average.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.average.values = {}  # the adapters hold the average that was evaluated best


def _check(regularization: Regularization, config: Any, args: Any) -> None:
    """Raise a `ValueError` if a setting would have no effect on adapters with this config, or a wrong one."""
    name, towers = type(config).__name__, getattr(config, "towers", None)
    text, image, logit = regularization[:3]
    for setting, of, used in (
        ("frozen_texts", "text_consistency and logit_consistency are", text or logit),
        ("feature_distance", "text_consistency and image_consistency are", text or image),
        ("average_std", "average_mean is", regularization.average_mean),
    ):
        if getattr(args, setting) != getattr(RegularizationArguments, setting) and not used:
            raise ValueError(f"{setting}={getattr(args, setting)!r} would change nothing, since {of} 0; leave it out.")
    if any(regularization[:3]) and towers is None:
        raise ValueError(
            "The losses text_consistency, image_consistency and logit_consistency compare prompts with the CLIP "
            f"without them, but {name} has no prompts; leave them out."
        )
    for loss, tower in ("text_consistency", "text"), ("image_consistency", "vision"):
        if getattr(regularization, loss) and tower not in towers:
            raise ValueError(
                f"{loss} compares features of the {tower} tower, which {name} does not change; leave it out."
            )
    if regularization.average_mean and args.probe_after is not None:
        raise ValueError(
            f"probe_after={args.probe_after} trains probes for the prompts of the last step before, but with "
            f"average_mean={regularization.average_mean} training results in other prompts; write average_mean=0.0, "
            "or leave probe_after out."
        )

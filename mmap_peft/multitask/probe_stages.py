"""Training in two stages: first prompts, then the probes on top of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoints import ClassifierTrainer


class ProbeStages(ClassifierTrainer):
    """With `probe_after`, trains the prompts in the first share of the steps, and only the probes in all others.

    Until then a probe that was not trained before stays zero, so the classifier is the text features that the prompts
    make, and the probe starts from those of the last step of the first stage. What does not train in a step has no
    gradient, so that the optimizer leaves it and its moments as they are. The number of the step says which stage it
    is, so a resumed training needs nothing else.

    Source: Farina et al., "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages", CVPR 2025. They
    train layer norms first, and restart the learning rate schedule at the switch, too.

    Raises:
        ValueError: the method has no probes, or DeepSpeed, whose optimizer moves parameters without a gradient.
    """

    keeps_adapters: bool

    def __init__(self, **kwargs: Any) -> None:
        config, share = kwargs["model"].adapter_config, kwargs["args"].probe_after
        if share is not None and not getattr(config, "probe", False):
            raise ValueError(
                f"probe_after={share} trains probes after prompts, but {type(config).__name__} has no probes; write "
                "MmAPConfig(probe=True), say, or leave probe_after out."
            )
        super().__init__(**kwargs)
        if share is not None and self.is_deepspeed_enabled:
            raise ValueError(
                f"probe_after={share} leaves parameters without a gradient, which DeepSpeed's optimizer would move "
                "all the same; use DDP (examples/accelerate_configs/multi_gpu.yaml)."
            )

    @contextmanager
    def only_this_stage(self) -> Iterator[None]:
        """Inside the `with` block, a training step, parameters of the other stage get no gradient."""
        frozen = self._parameters_of_the_other_stage()
        # DDP waits for the gradients of all parameters, so there they are computed and dropped.
        computed = isinstance(self.model_wrapped, DistributedDataParallel)
        try:
            for parameter in frozen:
                parameter.requires_grad_(computed)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
                parameter.grad = None

    def _parameters_of_the_other_stage(self) -> list[nn.Parameter]:
        if self.args.probe_after is None or not self.keeps_adapters:  # the shared adapter of stage 1 has no probe
            return []
        probes = self.state.global_step >= round(self.args.probe_after * self.state.max_steps)
        found = []
        for adapter in self.model.training_adapters:
            of_probe = {id(each) for each in self.model.adapter_set.class_parameters(adapter).values()}
            every = (each for each in self.model.adapter_parameters(adapter).values() if each.requires_grad)
            found += [each for each in every if (id(each) in of_probe) != probes]
        return found

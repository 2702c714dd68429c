"""`transformers.Trainer` for the adapters of a `MultiTaskClassifier`."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from . import processes
from .aggregation import add_task_gradients, aggregate_task_gradients, drop_task_gradients, find_aggregator
from .arguments import MultiTaskTrainingArguments
from .base_record import BaseRecord
from .cached_steps import CachingTrainer
from .checkpoint_files import saved_state
from .classifier import MultiTaskClassifier
from .images import TaskImages, collate
from .inputs import check_optimizer
from .metrics import accuracies, predicted_classes
from .not_finite import NotFinite
from .regularized_trainer import RegularizedTrainer
from .sampler import TaskSampler


_REFUSED = {
    "model_init": "it would make another classifier in each training; give the classifier as `model`",
    "compute_loss_func": "groups and aggregators need the loss of each task, which is the classifier's; override "
    "`TaskTrainer.compute_loss`",
}


class TaskTrainer(CachingTrainer, RegularizedTrainer, TrainerCallback):
    """Trains the adapters of a `MultiTaskClassifier` that are set to train, on the images of the tasks that use them.

    Every batch on every process has images of all these tasks. A run that is resumed from a checkpoint equals an
    uninterrupted run to the bit. The trainer is one of its own callbacks.

    Args:
        model (`MultiTaskClassifier`): the classifier.
        args (`MultiTaskTrainingArguments`, *optional*): the settings.
        train_dataset, eval_dataset (`TaskImages`, *optional*): taken from the tasks if not given.
        kwargs: as for `transformers.Trainer`, without `model_init` and `compute_loss_func`.

    Attributes:
        sampler (`TaskSampler`): the order of the training images, once training has begun.

    Raises:
        ValueError: the classifier has no adapters, `model_init` or `compute_loss_func` is given, or (when training
            begins) a task has no training image, or a given optimizer is one of parameters that do not train.
    """

    loss_is_scaled_for_ga = False  # the loss is a mean over the images of one batch
    keeps_adapters = True  # the adapters are results, which no later training may replace

    def __init__(
        self,
        model: MultiTaskClassifier,
        args: MultiTaskTrainingArguments | None = None,
        train_dataset: TaskImages | None = None,
        eval_dataset: TaskImages | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or MultiTaskTrainingArguments()
        for value, name, expected in (model, "model", MultiTaskClassifier), (args, "args", MultiTaskTrainingArguments):
            if not isinstance(value, expected):
                raise TypeError(f"Invalid {type(value).__name__} as `{name}`: expected a {expected.__name__}.")
        if not model.adapters:
            raise ValueError("A zero-shot classifier has nothing to train; give the MultiTaskClassifier a config.")
        for name, instead in _REFUSED.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"Invalid argument `{name}`: {instead}.")
        kwargs.setdefault("data_collator", collate)
        kwargs.setdefault("compute_metrics", lambda prediction: accuracies(prediction, model.tasks))
        kwargs.setdefault("preprocess_logits_for_metrics", lambda *given: predicted_classes(*given, model.tasks))
        if train_dataset is None:
            train_dataset = _images(model, args, "train", self.tasks_to_train(model, args))
        if eval_dataset is None:
            eval_dataset = _images(model, args, "eval")
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.sampler: TaskSampler | None = None
        self.add_callback(self)
        self._optimizer_given = self.optimizer is not None or self.lr_scheduler is not None
        self._seconds_waiting, self._not_finite = 0.0, NotFinite()  # waiting for batches
        tasks = 1 if args.sharing == "none" else len(model.tasks)
        self._aggregator = None if args.aggregator is None else find_aggregator(args.aggregator, tasks)
        if self.is_fsdp_enabled:
            BaseRecord.of(model)  # while the weights are whole
        processes.set_up(self)

    def tasks_to_train(self, model: MultiTaskClassifier, args: MultiTaskTrainingArguments) -> list[str]:
        """Names of the tasks whose images `train` needs."""
        return model.training_tasks

    # ---- steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_optimizer(self.model, args, kwargs["optimizer"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate's data loaders do not set a sampler's epoch if batches are skipped on resuming.
        self.sampler.set_epoch(state.global_step // self.sampler.steps)
        drop_task_gradients(self.model.parameters())  # of a training that was interrupted between two steps
        if self.keeps_adapters:
            self.model.trained_adapters.update(self.model.training_adapters)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.model.record.prompted = {}  # of weights that are about to change
        with self.only_this_stage():
            loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                self._combine_gradients(loss.device)
        return loss

    def _combine_gradients(self, device: torch.device) -> None:
        """Those of several tasks or processes, where neither torch nor DDP has done it."""
        if self._aggregator is not None:
            # Some aggregators draw random numbers, which must be the same on all processes.
            with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
                torch.manual_seed(self.args.seed + self.state.global_step)
                mean = functools.partial(self.accelerator.reduce, reduction="mean")
                aggregate_task_gradients(self.model.tasks_by_parameter(), self._aggregator, mean)
        elif processes.is_sharded(self.model):
            processes.average_gradients(self)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The classifier's loss. With an aggregator, the tasks' gradients are computed here; the loss then has none.

        Losses that are not finite are remembered on the device, since looking at a value waits for it.
        """
        aggregates = self._aggregator is not None and torch.is_grad_enabled()
        model = self.model if aggregates else model  # not the one that DDP wraps: it would wait for gradients
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        losses = self.losses_by_task(outputs, inputs)
        self._not_finite.add_losses(losses, self.state.global_step)
        if aggregates:
            with torch.autocast(loss.device.type, enabled=False):
                losses = losses / self.args.gradient_accumulation_steps
                add_task_gradients(losses, self.model.tasks_by_parameter())
            loss = loss.detach().requires_grad_()
        return (loss, outputs) if return_outputs else loss

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        control = self.control
        # With fp16 a scaler skips steps whose gradients are not finite, and what is saved is checked anyway.
        if grad_norm is not None and getattr(self.accelerator, "scaler", None) is None:
            self._not_finite.add_gradient(grad_norm, self.state.global_step - 1, tr_loss.device)
        if control.should_log or control.should_save or control.should_evaluate:
            self._not_finite.check(list(self.model.tasks))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    # ---- images

    def check_images(self) -> None:
        """Raise a `ValueError` if a task that is to train has no training image."""
        names = self.tasks_to_train(self.model, self.args)
        if not names:
            raise ValueError(
                "No adapter is set to train; write classifier.train_adapters(classifier.adapters). If the method is "
                "Tip-Adapter without train_keys, its caches are filled already; write classifier.fill_caches()."
            )
        sizes = dict(zip(self.model.tasks, getattr(self.train_dataset, "sizes", ())))
        for name in names:
            self.model.tasks[name].check_training_images()
            if not sizes.get(name):
                raise ValueError(
                    f"The trainer has no training images of task {name!r}, which was added or given images after the "
                    "trainer was made; make a new trainer."
                )

    def _get_train_sampler(self, train_dataset: TaskImages | None = None) -> TaskSampler:
        args, images = self.args, self.train_dataset if train_dataset is None else train_dataset
        batches = args.world_size * args.gradient_accumulation_steps
        order = batches, args.sampling, self.order_seed
        self.sampler = self.sampler_class(images.sizes, self._train_batch_size, *order)
        return self.sampler

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # A GPU still works on what was queued before, so this is the longest time that it can have been idle.
        start = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self._seconds_waiting += time.perf_counter() - start
        return batches

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `transformers.Trainer.log`; at the end of training with `train_waiting_share`, the share of its time (0
        to 1) that this process waited for images."""
        if "train_runtime" in logs and "train_loss" in logs:
            logs["train_waiting_share"] = round(min(1.0, self._seconds_waiting / logs["train_runtime"]), 4)
        super().log(logs, *args, **kwargs)

    # ---- evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; accuracies on `self.eval_dataset` are kept in the model's record."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._not_finite.check(list(self.model.tasks))
        if eval_dataset is None:
            keys = {name: f"{metric_key_prefix}_{task.adapter}_accuracy" for name, task in self.model.tasks.items()}
            by_task = {name: metrics[key] for name, key in keys.items() if key in metrics}
            prompted = any(self.model.current_routes.values())
            setattr(self.model.record, "prompted" if prompted else "zero_shot", by_task)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        enabled = self.is_deepspeed_enabled
        # Before training there is no engine, and none is needed: up to ZeRO-2 every process has all weights.
        self.is_deepspeed_enabled = enabled and self.deepspeed is not None
        try:
            with self.model.many_passes():
                return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_deepspeed_enabled = enabled
            if not self.is_in_train:
                # Otherwise accelerate would not prepare the model for training, and each process would train alone.
                self.model._is_accelerate_prepared = False

    # ---- training and resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As `transformers.Trainer.train`; the metrics also have `train_waiting_share`. Caches of training images are
        filled first if they are empty; if there is nothing else to train, there is no step."""
        self.check_images()
        self.model.adapter_set.check_routes(self.model.routes if self.keeps_adapters else {})
        self._check_optimizer()
        self.remove_leftovers(output := Path(self.args.output_dir))
        checkpoint = self.find_checkpoint(resume_from_checkpoint, [output])
        if checkpoint:
            self.check_order(checkpoint)
        elif self.model.adapter_set.empty_caches:
            self.model.fill_empty_caches(self.train_dataset, self.args.per_device_eval_batch_size)
            if not self.model.training_adapters:
                return TrainOutput(0, 0.0, {})
            self._check_optimizer()  # filled caches are new parameters
        self._seconds_waiting, self._not_finite = 0.0, NotFinite()
        if self.is_deepspeed_enabled and checkpoint:
            self._load_from_checkpoint(checkpoint)  # the engine's checkpoint holds weights only
        with self.model.many_passes():
            result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        self._not_finite.check(list(self.model.tasks))
        return result

    def _check_optimizer(self) -> None:
        """Raise a `ValueError` if a given optimizer has other parameters; remove one of an earlier training."""
        if self.optimizer is None:
            if self._optimizer_given:
                raise ValueError("`optimizers` holds a scheduler without its optimizer; give both.")
            return
        optimized = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        training = {parameter for parameter in self.model.parameters() if parameter.requires_grad}
        if not self._optimizer_given and optimized != training:
            self.optimizer = self.lr_scheduler = None
            self.model_wrapped, self.model._is_accelerate_prepared = self.model, False  # DDP holds parameters, too
        elif not optimized <= training:
            raise ValueError(
                "The optimizer that was given holds other parameters than those that train, since adapters were "
                "replaced, filled or set to train after it was made; make a new one, or give "
                "optimizer_cls_and_kwargs, from which the trainer makes an optimizer of the parameters that train."
            )

    def checkpoint_state(self) -> dict[str, Any]:
        sampler = self.sampler
        order = None if sampler is None else {"sizes": sampler.sizes, "seed": sampler.seed, "rows": len(sampler)}
        chosen = {name: task.trained_classes for name, task in self.model.tasks.items() if not task.trains_all_classes}
        if order is not None and chosen:
            order["classes"] = chosen
        return {"sampling": self.args.sampling, "order": order, **self.augmentation_state()}

    def check_order(self, checkpoint: str) -> None:
        """Raise a `ValueError` if the images would come in another order than in the training of a checkpoint."""
        saved = {"augment": "none", **saved_state(Path(checkpoint))}
        self._get_train_sampler()
        for name, value in {"augment": "none", **TaskTrainer.checkpoint_state(self)}.items():
            if saved[name] != value:
                raise ValueError(
                    f"{checkpoint} was trained with {name}={saved[name]}, but now it is {value}, so the images would "
                    "come in another order or look different; resume with the same images, batch size, seed, augment."
                )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.check_order(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def _images(
    classifier: MultiTaskClassifier, args: MultiTaskTrainingArguments, split: str, only: Sequence[str] | None = None
) -> TaskImages | None:
    """The images of some tasks, or `None` if there are none."""
    tasks, processor = classifier.tasks.values(), classifier.processor.image_processor
    images = TaskImages(tasks, split, processor, args.unreadable, only, args.image_cache_gb * 1e9)
    return images if len(images) else None

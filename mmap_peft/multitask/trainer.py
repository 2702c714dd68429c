"""`transformers.Trainer` for many tasks on one model."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, TrainOutput, get_last_checkpoint
from transformers.utils import logging

from ..hub.repository import hub_errors
from ..keywords import check_keywords
from . import processes
from .adapters import GLOBAL
from .affinity import cosine_similarity, task_gradients
from .aggregation import backward, find_aggregator
from .arguments import MultiTaskTrainingArguments
from .classifier import MultiTaskClassifier, task_losses
from .grouping import TaskGrouping
from .images import IGNORED, TaskImages, collate
from .plots import plot_grouping
from .record import changed_settings, versions
from .sampler import TaskSampler
from .saving import model_card


logger = logging.get_logger(__name__)

STATE_FILE = "multitask_state.json"
GROUPING_FOLDER = "grouping"  # inside the output folder: the checkpoints of stage 1, and what came out of it


class TaskTrainer(Trainer):
    """Trains the adapters of a `MultiTaskClassifier` that can be trained, on the images of the tasks that use them.

    Every batch of every process holds every such task. A checkpoint holds all adapters, routes and the grouping, and
    what the order of images depends on; resuming gives the uninterrupted run to the bit.

    Args:
        model (`MultiTaskClassifier`): the classifier.
        args (`MultiTaskTrainingArguments`, *optional*): the settings.
        train_dataset, eval_dataset (`TaskImages`, *optional*): taken from the tasks if not given.
        kwargs: as for `transformers.Trainer`.

    Raises:
        ValueError: the classifier has no adapters, or (when training begins) a task or class has no training image.
    """

    loss_is_scaled_for_ga = False  # the loss is a mean over the images of one batch

    def __init__(
        self,
        model: MultiTaskClassifier,
        args: MultiTaskTrainingArguments | None = None,
        train_dataset: TaskImages | None = None,
        eval_dataset: TaskImages | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or MultiTaskTrainingArguments()
        if not model.adapters:
            raise ValueError("A zero-shot classifier has nothing to train; give the MultiTaskClassifier a config.")

        def images(split: str, only: Sequence[str] | None = None) -> TaskImages | None:
            found = TaskImages(
                model.tasks.values(),
                split,
                model.processor.image_processor,
                args.unreadable,
                only,
                args.image_cache_gb * 1e9,
            )
            return found if len(found) else None

        kwargs.setdefault("data_collator", collate)
        kwargs.setdefault("compute_metrics", self.accuracy)
        kwargs.setdefault("preprocess_logits_for_metrics", lambda logits, labels: logits.argmax(-1))
        super().__init__(
            model=model,
            args=args,
            train_dataset=images("train", model.training_tasks) if train_dataset is None else train_dataset,
            eval_dataset=images("eval") if eval_dataset is None else eval_dataset,
            **kwargs,
        )
        self._sampler: TaskSampler | None = None
        self._waiting = 0.0  # seconds of this training in which no batch was there
        self._aggregator = None if args.aggregator is None else find_aggregator(args.aggregator)
        processes.set_up(self)

    # ---- processes

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.model.record.prompted = {}  # of weights that are about to change
        if self._aggregator is None:
            loss = super().training_step(*args, **kwargs)
        else:
            loss = self._aggregated_step(*args)
        apart = self._aggregator is not None and self.args.world_size > 1  # past DDP, which averages otherwise
        if (apart or processes.is_sharded(self.model)) and self.accelerator.sync_gradients:
            processes.average_gradients(self)
        return loss

    def _aggregated_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        """As `Trainer.training_step`, where shared parameters get what the aggregator makes of their tasks'
        gradients."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            # Not by way of DDP, which would wait for gradients that come otherwise.
            loss, outputs = self.compute_loss(self.model, inputs, return_outputs=True)
            losses = task_losses(outputs["logits"], inputs["labels"], inputs["task_ids"], len(self.model.tasks))
        accumulated = self.args.gradient_accumulation_steps
        backward([part / accumulated for part in losses], self.model.tasks_by_parameter(), self._aggregator)
        return loss.detach() / accumulated

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        enabled = self.is_deepspeed_enabled
        # Before training there is no engine, and none is needed: up to ZeRO-2 every process has all weights.
        self.is_deepspeed_enabled = enabled and self.deepspeed is not None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_deepspeed_enabled = enabled
            if not self.is_in_train:
                # accelerate would take the model for prepared, and each process would then train alone.
                self.model._is_accelerate_prepared = False

    # ---- images

    def _get_train_sampler(self, train_dataset: TaskImages | None = None) -> TaskSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        for name in self.model.training_tasks:
            self.model.tasks[name].check_training_images()
        self._sampler = TaskSampler(
            dataset.sizes,
            self._train_batch_size,
            self.args.world_size * self.args.gradient_accumulation_steps,
            self.args.sampling,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        return self._sampler

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # accelerate's loaders do not hand the epoch on to a sampler of our own once batches are skipped on resuming.
        self._sampler.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # On a GPU work goes on meanwhile that was queued before, so this is the most that it can have been idle.
        start = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self._waiting += time.perf_counter() - start

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `transformers.Trainer.log`; at the end of training with `train_waiting_share`, the share of its time (0
        to 1) that this process waited for images."""
        if "train_runtime" in logs and "train_loss" in logs:
            logs["train_waiting_share"] = round(min(1.0, self._waiting / logs["train_runtime"]), 4)
        super().log(logs, *args, **kwargs)

    # ---- loss and metrics

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The classifier's loss.

        Raises:
            ValueError: it is not finite; the sentence names the tasks.
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if not torch.isfinite(loss):
            valid = inputs["labels"] != IGNORED
            own = outputs["logits"][valid].gather(1, inputs["labels"][valid][:, None])[:, 0]
            names = list(self.model.tasks)
            bad = sorted({names[number] for number in inputs["task_ids"][valid][~torch.isfinite(own)].tolist()})
            raise ValueError(
                f"The loss is {loss.item()} at step {self.state.global_step}, from task {', '.join(bad)}; "
                "lower learning_rate, or look for images or weights that are not finite."
            )
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; accuracies on the trainer's own images enter the classifier's record."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None:
            keys = {name: f"{metric_key_prefix}_{task.adapter}_accuracy" for name, task in self.model.tasks.items()}
            found = {name: metrics[key] for name, key in keys.items() if key in metrics}
            prompted = any(self.model.routes.values())
            setattr(self.model.record, "prompted" if prompted else "zero_shot", found)
        return metrics

    def accuracy(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy of each task, their mean, and the worst, all between 0 and 1."""
        labels, task_ids = prediction.label_ids
        metrics = {}
        for number, task in enumerate(self.model.tasks.values()):
            mine = (task_ids == number) & (labels != IGNORED)
            if mine.any():
                metrics[f"{task.adapter}_accuracy"] = float((prediction.predictions[mine] == labels[mine]).mean())
        values = list(metrics.values())
        return {**metrics, "mean_accuracy": float(np.mean(values)), "worst_accuracy": min(values)}

    # ---- checkpoints

    def _state(self) -> dict[str, Any]:
        sampler = self._sampler
        order = None if sampler is None else {"sizes": sampler.sizes, "seed": sampler.seed, "rows": len(sampler)}
        return {"sampling": self.args.sampling, "order": order}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder)
        (folder / STATE_FILE).write_text(json.dumps(self._state()))
        (folder / "training_args.json").write_text(self.args.to_json_string())

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As `transformers.Trainer.train`; the metrics have `train_waiting_share` besides."""
        self._waiting = 0.0
        if self.is_deepspeed_enabled and isinstance(resume_from_checkpoint, str):
            self._load_from_checkpoint(resume_from_checkpoint)  # the engine's checkpoint knows weights only
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = json.loads((Path(resume_from_checkpoint) / STATE_FILE).read_text())
        self._get_train_sampler()
        for name, value in TaskTrainer._state(self).items():
            if saved[name] != value:
                raise ValueError(
                    f"{resume_from_checkpoint} was trained with {name}={saved[name]}, but now it is {value}, so the "
                    "images would come in another order; resume with the same images, batch size and seed."
                )
        self.model.load_adapters(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_adapters(self.state.best_model_checkpoint)

    # ---- Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).absolute().name):
            super().init_hf_repo(token, private)

    def create_model_card(self) -> None:
        """Write the classifier's model card, as `save_pretrained` does, into the output folder."""
        if self.is_world_process_zero():
            model_card(self.model, self.hub_model_id).save(Path(self.args.output_dir) / "README.md")

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | None:
        """Save the classifier in the output folder and push it to `hub_model_id` with its own `push_to_hub`.

        Nothing else of the output folder is uploaded. All processes call this; the first one pushes.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card()
        return self.model.push_to_hub(
            self.hub_model_id, token=token, revision=revision or self.args.hub_revision, commit_message=commit_message
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # transformers would upload the output folder, pickles and all.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        options = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        try:
            message = f"Training in progress, step {self.state.global_step}"
            self.model.push_to_hub(self.hub_model_id, commit_message=message, **options)
        except OSError as error:
            logger.warning(f"Training goes on, but {checkpoint_folder} was not pushed: {error}")


class Snapshots(TrainerCallback):
    """Takes the cosines of the tasks' gradients at evenly spread steps, the last time at the end.

    Args:
        trainer (`GlobalTrainer`): whose shared adapter the gradients are taken by.
    """

    def __init__(self, trainer: GlobalTrainer) -> None:
        self.trainer = trainer
        self.steps: list[int] = []
        self.similarities: list[np.ndarray] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        count = args.grouping_snapshots
        if state.global_step in {round((i + 1) * state.max_steps / count) for i in range(count)}:
            self.steps.append(state.global_step)
            self.similarities.append(self.trainer.snapshot())


class GlobalTrainer(TaskTrainer):
    """Stage 1: trains one global adapter on all tasks and watches how alike their gradients are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.snapshots = Snapshots(self)
        self.add_callback(self.snapshots)

    def snapshot(self) -> np.ndarray:
        """Cosines of the tasks' gradients by all parameters of the global adapter, (tasks, tasks)."""
        with self.compute_loss_context_manager():
            gradients = task_gradients(self.model, GLOBAL, self._snapshot_batches())
        gradients = self.accelerator.reduce(gradients, reduction="sum")
        return cosine_similarity(gradients, list(self.model.tasks))

    def _snapshot_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        data, world, rank = self.train_dataset, self.args.world_size, self.args.process_index
        chosen = []
        for task, size in enumerate(data.sizes):
            rng = np.random.default_rng([self.args.seed, self.state.global_step, task])
            chosen.extend(data.starts[task] + rng.permutation(size)[: self.args.snapshot_images])
        for rows in processes.share(np.array(chosen), self._train_batch_size, rank, world):
            batch = collate([data[int(row)] for row in (rows if len(rows) else chosen[:1])])
            if not len(rows):  # fewer images than processes: this one takes part and counts for nothing
                batch["labels"].fill_(IGNORED)
            yield batch

    def _state(self) -> dict[str, Any]:
        similarities = [matrix.tolist() for matrix in self.snapshots.similarities]
        return {**super()._state(), "snapshot_steps": self.snapshots.steps, "snapshots": similarities}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = json.loads((Path(resume_from_checkpoint) / STATE_FILE).read_text())
        self.snapshots.steps = saved["snapshot_steps"]
        self.snapshots.similarities = [np.array(matrix) for matrix in saved["snapshots"]]


class MultiTaskTrainer(TaskTrainer):
    """Groups the tasks of a `MultiTaskClassifier`, then trains the prompts of groups and tasks.

    If the method is none of prompts, there are no groups: its one adapter, or the tasks' probes, are what is trained.

    Stage 1 (`group_tasks`) trains one global adapter and groups tasks whose gradients are alike. Stage 2 gives every
    group and every task an adapter. A group's prompts collect the gradient of all its tasks, a task's prompts that of
    its task alone.

    ```python
    trainer = MultiTaskTrainer(model=classifier, args=MultiTaskTrainingArguments(output_dir="out"))
    trainer.train()
    trainer.evaluate()  # eval_<task>_accuracy, eval_mean_accuracy, eval_worst_accuracy
    ```

    Source: Xin et al., "MmAP: Multi-modal Alignment Prompt for Cross-domain Multi-task Learning", AAAI 2024.

    Args:
        callbacks (`list[TrainerCallback]`, *optional*): take part in both stages; `EarlyStoppingCallback`, which needs
            evaluation, in stage 2.
        kwargs: as for `TaskTrainer`.
    """

    @check_keywords(Trainer)
    def __init__(self, *args: Any, callbacks: Sequence[TrainerCallback] | None = None, **kwargs: Any) -> None:
        self._own_callbacks = list(callbacks or [])
        super().__init__(*args, callbacks=list(self._own_callbacks), **kwargs)

    def group_tasks(self, resume_from_checkpoint: str | None = None) -> TaskGrouping:
        """Stage 1: find the groups and give the classifier the adapters of stage 2.

        Args:
            resume_from_checkpoint (`str`, *optional*): a checkpoint of stage 1.
        """
        self.model.check_grouping()
        args, tasks = self.args, list(self.model.tasks)
        if args.grouping_steps:
            stage = self._global_trainer()
            stage.train(resume_from_checkpoint=resume_from_checkpoint)
            self.model._is_accelerate_prepared = False  # for other adapters it has to be wrapped and compiled anew
        if args.grouping == "gradient":
            found = stage.snapshots
            grouping = TaskGrouping.from_similarity(
                tasks, np.array(found.similarities), args.threshold, args.max_groups, found.steps
            )
        else:
            grouping = TaskGrouping.by_mode(args.grouping, tasks, args.parsed_groups, args.max_groups, args.seed)
        self.model.set_grouping(grouping, seed=args.seed)
        if args.should_save:
            folder = Path(args.output_dir) / GROUPING_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            grouping.save(folder / "grouping.json")
            if grouping.similarity is not None:
                plot_grouping(grouping, folder / "grouping.png")
        return grouping

    def _global_trainer(self) -> GlobalTrainer:
        args = copy.copy(self.args)
        args.output_dir = str(Path(args.output_dir) / GROUPING_FOLDER)
        args.max_steps = args.grouping_steps
        args.eval_strategy, args.load_best_model_at_end, args.push_to_hub = "no", False, False
        args.deepspeed_plugin = None  # of a second Accelerator: it takes that of the first, and is to be given none
        self.model.share_one_adapter(seed=args.seed)
        return GlobalTrainer(
            self.model,
            args,
            self.train_dataset,
            self.eval_dataset,
            callbacks=[call for call in self._own_callbacks if not isinstance(call, EarlyStoppingCallback)],
        )

    @check_keywords(Trainer.train)
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Group the tasks, if the method has prompts and that is not done, and train.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint of either stage; `True`: the last one in
                the output folder.
            kwargs: as for `transformers.Trainer.train`.
        """
        checkpoint = self._last_checkpoint() if resume_from_checkpoint is True else resume_from_checkpoint
        if checkpoint and "snapshots" in json.loads((Path(checkpoint) / STATE_FILE).read_text()):
            self.group_tasks(resume_from_checkpoint=checkpoint)
            checkpoint = None
        elif checkpoint:
            self.model.load_adapters(checkpoint)  # before an optimizer is made for other parameters
        else:
            self._give_adapters()
        self.model.record.settings, self.model.record.versions = changed_settings(self.args), versions()
        return super().train(resume_from_checkpoint=checkpoint or None, **kwargs)

    def _give_adapters(self) -> None:
        """Before training begins: whose adapters each task uses."""
        classifier, sharing = self.model, self.args.sharing
        own = {name: (task.adapter,) for name, task in classifier.tasks.items()}
        if sharing == "all":
            if classifier.uses_prompts:
                classifier.share_one_adapter(self.args.seed)
        elif sharing == "none":
            if classifier.routes != own:  # a probe is a task's own already
                classifier.separate_adapters(self.args.seed)
        elif classifier.grouping is None and (classifier.uses_prompts or self.args.grouping != "gradient"):
            self.group_tasks()  # which says so if the method can have no groups

    def _last_checkpoint(self) -> str:
        output = Path(self.args.output_dir)
        for folder in (output, output / GROUPING_FOLDER):
            found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
            if found:
                return found
        raise ValueError(f"{output} holds no checkpoint of either stage; write train() to begin anew.")

"""Groups the tasks of a classifier and trains its adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..keywords import check_keywords
from .adapters import GLOBAL
from .arguments import MultiTaskTrainingArguments
from .checkpoint_files import GRADIENTS_FILE
from .classifier import MultiTaskClassifier
from .grouping import TaskGrouping
from .grouping_stage import SharedAdapterTrainer
from .plots import plot_grouping
from .record import changed_settings, versions
from .task_trainer import TaskTrainer


logger = logging.get_logger(__name__)

GROUPING_FOLDER = "grouping"  # inside the output folder: checkpoints and results of stage 1
_OF_ONE_STAGE = ("model", "args", "train_dataset", "eval_dataset", "optimizers")


class MultiTaskTrainer(TaskTrainer):
    """Groups the tasks of a `MultiTaskClassifier`, then trains the prompts of groups and tasks.

    Stage 1 (`group_tasks`) trains one adapter that all tasks share, and groups tasks with similar gradients. Stage 2
    trains an adapter for each group, on all its tasks, and one for each task. Methods without prompts have no stage 1:
    their one adapter, or that on pooled features of each task, is trained.

    Adapters that hold training results (`MultiTaskClassifier.trained_adapters`) are never replaced: if there are any,
    `train` trains exactly the adapters that are set to train, whatever `sharing` and `grouping` are.

    ```python
    trainer = MultiTaskTrainer(model=classifier, args=MultiTaskTrainingArguments(output_dir="out"))
    trainer.train()
    trainer.evaluate()  # eval_<task>_accuracy, eval_mean_accuracy, eval_worst_accuracy
    ```

    Source: Xin et al., "MmAP: Multi-modal Alignment Prompt for Cross-domain Multi-task Learning", AAAI 2024.

    Args:
        callbacks (`list[TrainerCallback]`, *optional*): take part in both stages, as do those of `add_callback`;
            `EarlyStoppingCallback`, which needs evaluation, in stage 2 only.
        kwargs: as for `TaskTrainer`, for both stages. An optimizer in `optimizers` is refused if training begins with
            new adapters, since it holds the parameters of old ones; give `optimizer_cls_and_kwargs`, from which each
            stage makes its optimizer.
    """

    @check_keywords(Trainer)
    def __init__(self, *args: Any, callbacks: Sequence[TrainerCallback] | None = None, **kwargs: Any) -> None:
        given = list(callbacks or [])
        super().__init__(*args, callbacks=given, **kwargs)
        self._stage_kwargs = {name: value for name, value in kwargs.items() if name not in _OF_ONE_STAGE}
        self._standard_callbacks = [
            each for each in self.callback_handler.callbacks if each not in given and type(each) not in given
        ]

    def tasks_to_train(self, model: MultiTaskClassifier, args: MultiTaskTrainingArguments) -> list[str]:
        """Names of the tasks whose images `train` needs: all tasks, if it makes new adapters."""
        return model.training_tasks if model.trained_adapters or _has_layout(model, args) else list(model.tasks)

    # ---- stage 1

    def group_tasks(self, resume_from_checkpoint: str | None = None) -> TaskGrouping:
        """Stage 1: find the groups and give the classifier the adapters of stage 2.

        Args:
            resume_from_checkpoint (`str`, *optional*): a checkpoint of stage 1.

        Raises:
            ValueError: the method has no prompts, adapters hold training results, or an optimizer was given. Nothing
                has changed then.
        """
        args, classifier, tasks, grouping = self.args, self.model, list(self.model.tasks), None
        classifier.check_grouping()
        self._check_replacing()
        if args.grouping != "gradient":
            grouping = TaskGrouping.by_mode(args.grouping, tasks, args.parsed_groups, args.max_groups, args.seed)
        if args.grouping_steps:
            stage = self.shared_adapter_trainer()
            stage.train(resume_from_checkpoint=resume_from_checkpoint)
            classifier._is_accelerate_prepared = False  # with other adapters it must be wrapped and compiled again
        if grouping is None:
            grouping = self._group_by_gradients(stage)
        classifier.set_grouping(grouping, seed=args.seed, keep_global=args.sharing == "global+groups")
        if args.should_save:
            self._write_grouping(grouping)
        return grouping

    def _group_by_gradients(self, stage: SharedAdapterTrainer) -> TaskGrouping:
        """The groups that the snapshots of stage 1 give, with warnings if they are not stable or not the best."""
        args = self.args
        grouping = TaskGrouping.from_gradients(
            list(self.model.tasks),
            stage.snapshots,
            args.affinity,
            args.threshold,
            args.max_groups,
            args.unstable,
            args.grouping_seconds,
            args.seed,
            args.disable_tqdm or not stage.is_local_process_zero(),
        )
        grouping = broadcast_object_list([grouping])[0]  # processes that run out of time may find different groups
        for remark in grouping.remarks:
            logger.warning(remark)
        return grouping

    def _write_grouping(self, grouping: TaskGrouping) -> None:
        folder = Path(self.args.output_dir) / GROUPING_FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            grouping.save(folder / "grouping.json")
            if grouping.similarity is not None:
                plot_grouping(grouping, folder / "grouping.png")
        except OSError as error:
            logger.warning(f"Training goes on, but the grouping was not written into {folder}: {error}")

    def _check_replacing(self) -> None:
        """Raise a `ValueError` if the classifier's adapters cannot be replaced by new ones."""
        trained = self.model.trained_adapters
        if trained:
            raise ValueError(
                f"The adapters {', '.join(sorted(trained))} hold training results, which grouping the tasks would "
                "replace; write classifier.reset_adapters() first to give them up, or train() to train them further."
            )
        if self._optimizer_given:
            raise ValueError(
                "`optimizers` holds the parameters of adapters that are replaced when training begins, so it would "
                "train nothing; give optimizer_cls_and_kwargs=(torch.optim.SGD, {'lr': 0.1}), say, from which each "
                "stage makes its optimizer."
            )
        self.check_images()
        self._get_train_sampler()  # raises if a batch cannot hold all tasks

    def shared_adapter_trainer(self) -> SharedAdapterTrainer:
        """The trainer of stage 1; all tasks share one adapter from now on."""
        args = copy.copy(self.args)
        args.output_dir = str(Path(args.output_dir) / GROUPING_FOLDER)
        args.max_steps, args.eval_strategy = args.grouping_steps, "no"
        args.load_best_model_at_end = args.push_to_hub = args.eval_on_start = False
        args.deepspeed_plugin = None  # a second Accelerator uses that of the first
        self.model.share_one_adapter(seed=args.seed)
        callbacks = [
            each
            for each in self.callback_handler.callbacks
            if each not in self._standard_callbacks and not isinstance(each, EarlyStoppingCallback)
        ]
        data = self.train_dataset, self.eval_dataset
        return SharedAdapterTrainer(self.model, args, *data, callbacks=callbacks, **self._stage_kwargs)

    # ---- both stages

    @check_keywords(Trainer.train)
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Group the tasks, if the method has prompts and no adapter is trained yet, and train.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint of either stage; `True`: the last one in
                the output folder.
            kwargs: as for `transformers.Trainer.train`.

        Raises:
            ValueError: there is no such checkpoint, a task has no training images, or an optimizer was given for
                adapters that are replaced. No adapter has changed then.
        """
        folders = [Path(self.args.output_dir), Path(self.args.output_dir, GROUPING_FOLDER)]
        self.remove_leftovers(*folders)
        checkpoint = self.find_checkpoint(resume_from_checkpoint, folders)
        self.check_images()
        if checkpoint and Path(checkpoint, GRADIENTS_FILE).exists():
            self.group_tasks(resume_from_checkpoint=checkpoint)
            checkpoint = None
        elif checkpoint:
            self.check_order(checkpoint)
            self.model.load_adapters(checkpoint)  # before an optimizer is made for other parameters
        elif not _has_layout(self.model, self.args):
            self._give_adapters()
        self.model.record.settings, self.model.record.versions = changed_settings(self.args), versions()
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _give_adapters(self) -> None:
        """Give each task the adapters of `sharing`, or warn if the present ones are trained and stay."""
        classifier, sharing = self.model, self.args.sharing
        if classifier.trained_adapters:
            routes = "; ".join(f"{task}: {', '.join(route)}" for task, route in classifier.routes.items())
            logger.warning(
                f"sharing={sharing!r} asks for other adapters than the classifier has ({routes}). Adapters that hold "
                f"training results are not replaced, so {', '.join(classifier.training_adapters)} will be trained as "
                "they are; write classifier.reset_adapters() first to start again."
            )
        elif sharing in ("groups", "global+groups"):
            self.group_tasks()  # raises if the method cannot have groups
        else:
            classifier.check_grouping()
            self._check_replacing()
            replace_adapters = classifier.share_one_adapter if sharing == "all" else classifier.separate_adapters
            replace_adapters(self.args.seed)


def _has_layout(classifier: MultiTaskClassifier, args: MultiTaskTrainingArguments) -> bool:
    """Whether the tasks use adapters as `sharing` says."""
    if args.sharing == "all":
        return not classifier.uses_prompts or classifier.adapters == [GLOBAL]
    if args.sharing == "none":
        return classifier.routes == {name: (task.adapter,) for name, task in classifier.tasks.items()}
    if classifier.grouping is not None:
        return args.sharing == "groups" or GLOBAL in classifier.adapters
    # By default a method without prompts trains without groups; with any other `grouping`, `group_tasks` raises.
    return not (classifier.uses_prompts or args.grouping != "gradient")

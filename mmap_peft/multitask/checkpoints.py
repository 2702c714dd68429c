"""A `transformers.Trainer` whose checkpoints are folders of a `MultiTaskClassifier`, on disk and on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, rotate_checkpoints
from transformers.utils import logging

from ..checking import checked
from ..hub.repository import hub_errors
from . import saving
from .checkpoint_files import STATE_FILE, checkpoints, new_checkpoint, partial, problem, remove_leftovers
from .files import write_json
from .saving import model_card


logger = logging.get_logger(__name__)

CANNOT_WRITE = "inline_container|PytorchStreamWriter|iostream error"  # what torch.save says of a full disk


class ClassifierTrainer(Trainer):
    """Saves, loads and pushes a `MultiTaskClassifier` with the classifier's own methods.

    A checkpoint is written beside and renamed when it is whole.

    A checkpoint holds the files of `MultiTaskClassifier.save_pretrained`, `multitask_state.json`, and what
    transformers needs to resume training.
    """

    _partial: str | None = None  # where a checkpoint is being written

    def checkpoint_state(self) -> dict[str, Any]:
        """What `multitask_state.json` holds."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what `MultiTaskClassifier.save_pretrained` writes, the settings, and `checkpoint_state`."""
        if self.args.should_save:  # every process holds all adapters
            folder = Path(output_dir or self.args.output_dir)
            saving.save(self.model, folder, card=not (_internal_call or self.args.push_to_hub))
            write_json(self.checkpoint_state(), folder / STATE_FILE)
            write_json(self.args.to_sanitized_dict(), folder / "training_args.json")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # ---- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, state = Path(self._get_output_dir(trial)), self.state
        checkpoint, saves = folder / f"checkpoint-{state.global_step}", self.args.should_save
        try:
            with new_checkpoint(checkpoint) if saves else nullcontext(partial(checkpoint)) as new:
                self.accelerator.wait_for_everyone()  # the folder is there
                self._partial = str(new.parent)
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each process has written its files
                if state.best_global_step == state.global_step:
                    state.best_model_checkpoint = str(checkpoint)
                if saves:
                    state.save_to_json(str(new / "trainer_state.json"))
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not re.search(CANNOT_WRITE, str(error)):
                raise
            raise OSError(
                f"{checkpoint} cannot be written ({str(error)[:200]}); earlier checkpoints are whole. Make space, and "
                "resume from the last one."
            ) from error
        finally:
            self._partial = None
        self.accelerator.wait_for_everyone()  # the checkpoint has its name
        if saves:
            rotate_checkpoints(str(folder), self.args.save_total_limit, state.best_model_checkpoint, use_mtime=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        return self._partial or super()._get_output_dir(trial)

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None, folders: Sequence[Path]) -> str | None:
        """The checkpoint to resume from: the one that is given, or for `True` the last whole one in the first of
        these folders that has any; `None` to start anew.

        Raises:
            ValueError: training cannot go on from the checkpoint that is given, or there is none.
        """
        if not checked(resume_from_checkpoint, bool | str | os.PathLike | None, "resume_from_checkpoint"):
            return None
        every = [each for folder in folders for each in checkpoints(folder)]
        if resume_from_checkpoint is not True:
            every = [Path(resume_from_checkpoint)]
        for checkpoint in every:
            reason = problem(checkpoint)
            if reason is None:
                return str(checkpoint)
            if resume_from_checkpoint is not True:
                raise ValueError(reason)
            logger.warning(f"Passing over {checkpoint}: {reason}")
        raise ValueError(
            f"{folders[0]} holds no {'whole ' if every else ''}checkpoint of either stage"
            f"{', as ' + reason[:200] if every else ''}; write train() to start again."
        )

    def remove_leftovers(self, *folders: Path) -> None:
        """Remove what processes left that ended while they wrote a checkpoint into one of these folders."""
        for folder in folders if self.args.should_save else ():
            remove_leftovers(folder)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_adapters(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_adapters(self.state.best_model_checkpoint)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).absolute().name):
            super().init_hf_repo(token, private)

    def create_model_card(self) -> None:
        """Write the classifier's model card into the output folder."""
        if self.is_world_process_zero():
            model_card(self.model, self.hub_model_id).save(Path(self.args.output_dir) / "README.md")

    def push_to_hub(self, commit_message: str = "End of training", **options: Any) -> CommitInfo | None:
        """Save the classifier in the output folder and push it, and nothing else of that folder, to `hub_model_id`.

        All processes call this; the first one pushes. Options are those of `MultiTaskClassifier.push_to_hub`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        options["token"] = options.get("token") or self.args.hub_token
        options["revision"] = options.get("revision") or self.args.hub_revision
        if self.hub_model_id is None:
            self.init_hf_repo(options["token"], options.get("private"))
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir)
        return saving.push(self.model, self.hub_model_id, commit_message=commit_message, card_folder=folder, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._partial or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        options = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        try:
            message = f"Training in progress, step {self.state.global_step}"
            self.model.push_to_hub(self.hub_model_id, commit_message=message, **options)
        except OSError as error:
            logger.warning(f"Training goes on, but {checkpoint_folder} was not pushed: {error}")

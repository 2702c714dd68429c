"""A `transformers.Trainer` whose checkpoints are folders of a `MultiTaskClassifier`, on disk and on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..hub.repository import hub_errors
from .saving import model_card


logger = logging.get_logger(__name__)

STATE_FILE = "multitask_state.json"


def saved_state(checkpoint: str) -> dict[str, Any]:
    """What the `multitask_state.json` of a checkpoint holds.

    Raises:
        ValueError: the folder has no such file.
    """
    try:
        return json.loads((Path(checkpoint) / STATE_FILE).read_text())
    except OSError as error:
        raise ValueError(
            f"{checkpoint} is no checkpoint to resume from ({error}); give a folder `checkpoint-<step>` that this "
            "trainer wrote."
        ) from error


class ClassifierTrainer(Trainer):
    """Saves, loads and pushes a `MultiTaskClassifier` with the classifier's own methods.

    A checkpoint holds the files of `MultiTaskClassifier.save_pretrained`, `multitask_state.json`, and what
    transformers needs to resume training.
    """

    def checkpoint_state(self) -> dict[str, Any]:
        """What `multitask_state.json` holds."""
        raise NotImplementedError

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what `MultiTaskClassifier.save_pretrained` writes, the settings, and `checkpoint_state`."""
        if self.args.should_save:  # every process holds all adapters
            folder = Path(output_dir or self.args.output_dir)
            self.model.save_pretrained(folder)
            (folder / STATE_FILE).write_text(json.dumps(self.checkpoint_state()))
            (folder / "training_args.json").write_text(self.args.to_json_string())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

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
        self.create_model_card()
        if not self.is_world_process_zero():
            return None
        return self.model.push_to_hub(self.hub_model_id, commit_message=commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        options = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        try:
            message = f"Training in progress, step {self.state.global_step}"
            self.model.push_to_hub(self.hub_model_id, commit_message=message, **options)
        except OSError as error:
            logger.warning(f"Training goes on, but {checkpoint_folder} was not pushed: {error}")

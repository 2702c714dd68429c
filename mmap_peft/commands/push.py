"""Push a model to the Hub, with its model card, in one commit.

    mmap-peft push out/photos me/clip-mmap-photos --private

Log in once with `hf auth login`, or set HF_TOKEN. Only files that have changed are uploaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional

from .parsing import CommandParser
from .reading import MODEL_HELP, read_model


@dataclass
class PushArguments:
    """The arguments of the command, as for `MultiTaskClassifier.push_to_hub`."""

    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    revision: Optional[str] = field(default=None, metadata={"help": "branch, created if it does not exist"})
    subfolder: Optional[str] = field(default=None, metadata={"help": "folder inside the repository"})
    parent_commit: Optional[str] = field(
        default=None, metadata={"help": "id of the last commit that you know; refuse if there is a newer one"}
    )
    commit_message: str = field(default="Upload adapters", metadata={"help": "what the commit says"})
    license: Optional[str] = field(default=None, metadata={"help": "license of the adapters, such as mit"})


def main(argv: Sequence[str]) -> None:
    places = {"model": MODEL_HELP, "repo_id": "name of the repository, such as me/clip-mmap-photos"}
    own, place, _ = CommandParser("mmap-peft push", [PushArguments], __doc__, places).parse(argv)
    classifier = read_model(place.model)
    classifier.record.license = own.license or classifier.record.license
    options = {name: value for name, value in vars(own).items() if name not in ("private", "license")}
    print(classifier.push_to_hub(place.repo_id, private=own.private or None, **options).commit_url)

"""Write the model card of a model anew, or print it.

    mmap-peft card out/photos
    mmap-peft card out/photos --license mit --repo_id me/clip-mmap-photos

The card is made of what training recorded; --license adds what only you can know.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from ..multitask.saving import model_card, write_card
from .parsing import CommandParser
from .reading import MODEL_HELP, read_model


@dataclass
class CardArguments:
    """The arguments of the command."""

    license: Optional[str] = field(
        default=None, metadata={"help": "license of the adapters, such as mit; kept in the model's folder"}
    )
    repo_id: Optional[str] = field(
        default=None, metadata={"help": "name that the model has on the Hub, for the card's code"}
    )
    print: bool = field(default=False, metadata={"help": "print the card, and change nothing"})


def main(argv: Sequence[str]) -> None:
    own, place, _ = CommandParser("mmap-peft card", [CardArguments], __doc__, {"model": MODEL_HELP}).parse(argv)
    classifier = read_model(place.model)
    classifier.record.license = own.license or classifier.record.license
    if own.print or not os.path.isdir(place.model):
        print(model_card(classifier, own.repo_id).content)
        return
    if own.license:
        classifier.save_pretrained(place.model)
    write_card(classifier, Path(place.model), own.repo_id)
    print(Path(place.model) / "README.md")

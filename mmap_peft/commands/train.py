"""Train on a folder of images, or on a data set of the Hub, and compare with plain CLIP.

    mmap-peft train photos                        photos/cat/1.jpg, photos/dog/1.jpg: one task
    mmap-peft train office --shots 4              office/Art/bed/1.jpg, office/Clip/bed/1.jpg: two
    mmap-peft train flwrlabs/office-home          from the Hub
    mmap-peft train settings.yaml                 arguments in a file; those on the line are first
    accelerate launch -m mmap_peft train photos   on several GPUs

Folders called train and test say which images train; else 70 % of each class do (--fraction).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Optional

from ..data.folders import short
from ..data.splits import Split
from ..hub.repository import hub_id
from ..multitask.arguments import MultiTaskTrainingArguments
from ..multitask.record import changed_settings
from ..multitask.saving import TASKS_FILE
from ..multitask.task import Task
from ..prompts.base import PromptConfig
from .parsing import CommandParser
from .reading import DATA_HELP, read_data
from .training import TrainingData, make_named_tasks, train_and_compare


FRACTION = 0.7  # at least one image of a class that has two or more is held out
PATHS = ("model", "split_dir")
SHOWN = {
    **dict.fromkeys(("model", "shots", "fraction", "split_dir", "demo"), ""),
    "output_dir": "folder to write",
    **dict.fromkeys(("overwrite", "license"), ""),
    "seed": "seed of the split and of training",
    "num_train_epochs": "how often each image trains",
    "max_steps": "number of steps, instead of epochs",
    "learning_rate": "learning rate at the start, by default that of the method",
    **dict.fromkeys(("method", "config"), ""),
    "num_prompts": "",
    "template": "text of a class, with {} for its name",
    "augment": "random changes of images that train, such as crop+flip",
    "unreadable": "what to do with files that are no images",
    "use_cpu": "train on the CPU",
}


@dataclass
class TrainArguments(TrainingData):
    """The arguments of the command that are none of training itself."""

    overwrite: bool = field(default=False, metadata={"help": "replace a model that the output folder holds"})
    license: Optional[str] = field(default=None, metadata={"help": "license of the adapters, for the model card: mit"})


def main(argv: Sequence[str]) -> None:
    parser = CommandParser(
        "mmap-peft train",
        [TrainArguments, MultiTaskTrainingArguments],
        __doc__,
        {"data": DATA_HELP},
        SHOWN,
        optional=["data"],
    )
    parser.set_defaults(output_dir="out/DATA")
    own, args, place, given = parser.parse(argv)
    own.choose_learning_rate(args, given)
    data = "Pictograms" if own.demo else place.data
    if not data:
        raise ValueError("DATA is missing; write the path of a folder of images, a name on the Hub, or --demo.")
    name = os.path.basename(os.path.abspath(data))
    if "output_dir" not in given:
        args.output_dir = os.path.join("out", name)
    if not (own.overwrite or args.resume_from_checkpoint) and Path(args.output_dir, TASKS_FILE).exists():
        raise ValueError(
            f"{args.output_dir} holds a trained model; write another --output_dir, or --overwrite to replace it."
        )
    domains = own.use_demo({*given, *(["data"] if place.data else [])}) if own.demo else read_data(data)
    split = own.split(domains, 0.3 if own.demo else FRACTION, args.seed)
    tasks = make_named_tasks(domains, split, args.template, data)
    _check_evaluation(tasks)
    _adapt(tasks, own, args, given)
    _say(tasks, split, args)
    train_and_compare(tasks, split, own, args, license=own.license, command=command_line(data, own, args, given))
    if args.process_index == 0:
        print(f"\nNext: mmap-peft predict {shlex.quote(args.output_dir)} image.jpg")


def _check_evaluation(tasks: Sequence[Task]) -> None:
    empty = [task.name for task in tasks if not len(task.eval)]
    if empty:
        raise ValueError(
            f"No image of {short(empty[0])} is left to evaluate on, since each class has only one image or all of "
            "them train; add images, or write a smaller --shots or --fraction."
        )


def _adapt(
    tasks: Sequence[Task], own: TrainArguments, args: MultiTaskTrainingArguments, given: Collection[str]
) -> None:
    """Set what the data decide, of the arguments that were not given."""
    has_groups = isinstance(own.method_config(), PromptConfig)
    if has_groups and len(tasks) == 1 and not {"sharing", "grouping"} & set(given):
        args.sharing = "none"  # there is nothing to group
    if "logging_steps" not in given:
        args.logging_steps = 0.05  # of all steps, for the curves of `mmap-peft report`


def _say(tasks: Sequence[Task], split: Split, args: MultiTaskTrainingArguments) -> None:
    if args.process_index:
        return
    for task in tasks:
        images, held = len(task.train) + len(task.eval), len(task.eval)
        print(
            f"{task.name}: {images} images of {len(task.class_names)} classes; {images - held} train, {held} are "
            "held out to evaluate.",
            file=sys.stderr,
        )
    how = ", ".join(f"{name} {value}" for name, value in split.source.items() if value is not None)
    print(f"How the images were split: {how}.", file=sys.stderr)


def command_line(data: str, own: TrainArguments, args: MultiTaskTrainingArguments, given: Collection[str] = ()) -> str:
    """The command that trains the same again; folders are shown by their last name. Of the `given` arguments it has
    those with default values, too, since the data or the method may decide what is not given."""
    names = [each.name for each in fields(own) if getattr(own, each.name) != each.default]
    values = {name: getattr(own, name) for name in names if name != "overwrite" and not (own.demo and name == "model")}
    values |= {name: getattr(args, name) for name in changed_settings(args, given) if name != "processes"}
    words = ["mmap-peft", "train", *([] if own.demo else [_without_path(data)])]
    for name, value in values.items():
        texts = value if isinstance(value, list) else [_without_path(value) if name in PATHS else value]
        texts = [json.dumps(text) if isinstance(text, dict) else getattr(text, "value", text) for text in texts]
        words += [f"--{name}", *map(str, texts)]
    return shlex.join(words)


def _without_path(name: str) -> str:
    return hub_id(name) or os.path.basename(os.path.abspath(name))

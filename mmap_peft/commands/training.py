"""Trains a classifier of tasks and compares it with the plain CLIP; what `mmap-peft train` and the examples share."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from datasets import Dataset
from peft import PeftConfig
from transformers import set_seed

from ..checking import checked
from ..data.folders import short
from ..data.pictograms import pictogram_domains, small_clip
from ..data.splits import Split, has_split, make_tasks, read_lists, split_at_random, split_of_folders
from ..hub.repository import hub_id
from ..keywords import check_keywords
from ..methods.by_name import METHODS
from ..multitask.arguments import MultiTaskTrainingArguments
from ..multitask.classifier import MultiTaskClassifier
from ..multitask.files import write_json
from ..multitask.task import Task
from ..multitask.trainer import MultiTaskTrainer
from ..registration import starting_learning_rate
from .reading import SPLIT_FILE, read_clip
from .results import results, results_table


@dataclass
class TrainingData:
    """Which CLIP is trained, and which images train. The examples add the name of their data set."""

    model: str = field(
        default="openai/clip-vit-base-patch16", metadata={"help": "CLIP's name on the Hub, or a folder"}
    )
    fraction: Optional[float] = field(default=None, metadata={"help": "share of each class's images that train"})
    shots: Optional[int] = field(default=None, metadata={"help": "number of images of each class that train, instead"})
    split_dir: Optional[str] = field(default=None, metadata={"help": "folder of published lists of the images"})
    method: str = field(default="mmap", metadata={"help": "what trains, such as lora or linear_probe"})
    config: Optional[str] = field(default=None, metadata={"help": """settings of the method, as JSON: '{"r": 4}'"""})
    num_prompts: Optional[int] = field(default=None, metadata={"help": "prompts of an adapter in each layer"})
    demo: bool = field(default=False, metadata={"help": "train on pictograms and a small CLIP of this package"})

    def use_demo(self, given: Collection[str]) -> dict[str, Dataset]:
        """Take the small CLIP, and return the images of Pictograms; `data` is its name then. Raises a `ValueError` if
        other data or another model are among the `given` arguments."""
        if replaced := sorted({"data", "model"} & set(given)):
            raise ValueError(
                f"--demo trains on Pictograms with the small CLIP of this package, so {' and '.join(replaced)} would "
                "not be used; leave out --demo, or what it replaces."
            )
        self.model, self.data = str(small_clip()), "Pictograms"
        return pictogram_domains()

    def __post_init__(self) -> None:
        if self.config is not None and not isinstance(self.config, str):  # of a YAML file
            self.config = json.dumps(self.config)

    def method_config(self) -> PeftConfig:
        """The config of the method with the given settings. Raises a `ValueError` if there is no such method, or if it
        refuses them."""
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(f"{short(str(self.method))} is no method; write one of {', '.join(METHODS)}.")
        make, given = METHODS[self.method], _read_settings(self.config or "{}")
        if self.num_prompts is not None:
            if "num_prompts" in given or not hasattr(make(), "num_prompts"):
                reason = "in --config as well" if "num_prompts" in given else f"no setting of {self.method}"
                raise ValueError(f"--num_prompts {self.num_prompts} is {reason}; leave it out.")
            given["num_prompts"] = self.num_prompts
        try:
            return check_keywords(type(make()))(make)(**given)
        except TypeError as error:
            raise ValueError(f"--method {self.method}: {error}") from None

    def choose_learning_rate(self, args: MultiTaskTrainingArguments, given: Collection[str]) -> None:
        """Set the learning rate to start with for the method if none is among the `given` arguments."""
        if "learning_rate" not in given:
            args.learning_rate = starting_learning_rate(self.method_config())

    def split(self, domains: Mapping[str, Dataset], fraction: float, seed: int) -> Split:
        """Which images train and which evaluate: what lists, folders or arguments say, else a `fraction` trains."""
        chosen = self.fraction is not None or self.shots is not None
        if self.split_dir and self.shots:
            raise ValueError("Published lists say which images train; write --fraction with --split_dir, not --shots.")
        if self.split_dir:
            return read_lists(self.split_dir, self.fraction if chosen else fraction)
        if has_split(domains) and not chosen:
            return split_of_folders(domains)
        return split_at_random(domains, self.fraction if chosen else fraction, self.shots, seed)


def _read_settings(text: str) -> dict[str, Any]:
    """The settings in a text, which is a JSON object. Raises a `ValueError` if it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    return checked(found, dict[str, Any], "config", """expected settings such as '{"probe": true}'""")


def make_named_tasks(domains: Mapping[str, Dataset], split: Split, template: Any, data: str) -> list[Task]:
    """The tasks of a split, whose cards name the data set `data` by its name on the Hub or its folder's name."""
    return make_tasks(domains, split, template, dataset=hub_id(data) or Path(data).name)


def train_and_compare(
    tasks: Sequence[Task], split: Split, data: TrainingData, args: MultiTaskTrainingArguments, **record: Any
) -> dict[str, Any]:
    """Evaluate the plain CLIP, train, evaluate, and write everything to `args.output_dir`.

    Args:
        tasks, split: what is trained.
        data, args: the settings.
        record: fields of `MultiTaskClassifier.record`, such as `command`.

    Returns:
        What `results.json` holds. The first process also prints it as a table.
    """
    start = time.perf_counter()
    set_seed(args.seed)
    clip, processor = read_clip(data.model)
    classifier = MultiTaskClassifier(clip, processor, tasks, data.method_config(), seed=args.seed)
    trainer = MultiTaskTrainer(model=classifier, args=args)

    with classifier.zero_shot():
        before = trainer.evaluate(metric_key_prefix="zero_shot")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate()
    classifier.compute_prototypes(unreadable=args.unreadable)  # for images without a task

    seconds = round(time.perf_counter() - start, 1)
    summary = results(classifier, before, after, seed=args.seed, seconds=seconds, split=split.digest)
    if trainer.is_world_process_zero():
        output = Path(args.output_dir)
        for name, value in record.items():
            setattr(classifier.record, name, value)
        classifier.save_pretrained(output)
        split.save(output / SPLIT_FILE)
        trainer.save_state()
        write_json(summary, output / "results.json")
        print(results_table(summary), f"{seconds} s. Written to {output}.", sep="\n")
    return summary

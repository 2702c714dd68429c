"""Train MmAP on the four domains of MiniDomainNet, and compare it with zero-shot CLIP.

    accelerate launch examples/train_minidomainnet.py --model openai/clip-vit-base-patch16 \
        --data PATH/domainnet --split_dir PATH/domainnet/splits_mini --fraction 0.1 --output_dir out

`--data` takes DomainNet's folder as downloaded (`PATH/clipart/aircraft_carrier/clipart_001_000001.jpg`) or a name on
the Hub; `--split_dir` takes MiniDomainNet's lists, of whose training images a fraction or `--shots` is used. Without
lists, a fixed subset is used that is not the published one. All else is as in `train_officehome.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from datasets import Dataset

from mmap_peft import MultiTaskTrainingArguments
from mmap_peft.commands.parsing import CommandParser
from mmap_peft.commands.training import TrainingData, make_named_tasks, train_and_compare
from mmap_peft.data.mini_domainnet import read_mini_domainnet, read_mini_lists
from mmap_peft.data.splits import Split, draw, split_at_random


@dataclass
class MiniDomainNet(TrainingData):
    data: str = field(default="wltjr1007/DomainNet", metadata={"help": "data set's name on the Hub, or a folder"})
    at_most: int = field(default=60, metadata={"help": "without lists, number of images of each class and domain"})

    def split(self, domains: Mapping[str, Dataset], fraction: float, seed: int) -> Split:
        amount = (fraction if self.fraction is None and self.shots is None else self.fraction, self.shots, seed)
        if self.split_dir:
            return draw(read_mini_lists(self.split_dir), *amount)
        return split_at_random(domains, *amount, self.at_most)


def main() -> None:
    ours, args, given = CommandParser(
        "train_minidomainnet.py", [MiniDomainNet, MultiTaskTrainingArguments], __doc__
    ).parse(sys.argv[1:])
    ours.choose_learning_rate(args, given)
    images = ours.use_demo(given) if ours.demo else read_mini_domainnet(ours.data)
    split = ours.split(images, fraction=0.3 if ours.demo else 0.1, seed=args.seed)
    train_and_compare(make_named_tasks(images, split, args.template, ours.data), split, ours, args)


if __name__ == "__main__":
    main()

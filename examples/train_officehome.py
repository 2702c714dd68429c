"""Train MmAP on the four domains of Office-Home, and compare it with zero-shot CLIP.

    accelerate launch examples/train_officehome.py --model openai/clip-vit-base-patch16 \
        --data flwrlabs/office-home --fraction 0.1 --output_dir out

`--data` takes the usual folder (`PATH/Art/Alarm_Clock/00001.jpg`) as well, or any other of `domain/class/image` or
`domain/train|test/class/image`; `--split_dir` takes published lists, `--shots 4` trains on four images of each class.
Settings can also come from one YAML file: `accelerate launch examples/train_officehome.py settings.yaml`. Offline, on
pictograms and a small CLIP that ship with the package:

    accelerate launch examples/train_officehome.py --demo
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from mmap_peft import MultiTaskTrainingArguments
from mmap_peft.commands.parsing import CommandParser
from mmap_peft.commands.reading import read_data
from mmap_peft.commands.training import TrainingData, make_named_tasks, train_and_compare


@dataclass
class OfficeHome(TrainingData):
    data: str = field(default="flwrlabs/office-home", metadata={"help": "data set's name on the Hub, or a folder"})


def main() -> None:
    parser = CommandParser("train_officehome.py", [OfficeHome, MultiTaskTrainingArguments], __doc__)
    chosen, args, given = parser.parse(sys.argv[1:])
    chosen.choose_learning_rate(args, given)
    domains = chosen.use_demo(given) if chosen.demo else read_data(chosen.data)
    split = chosen.split(domains, fraction=0.3 if chosen.demo else 0.1, seed=args.seed)
    tasks = make_named_tasks(domains, split, args.template, chosen.data)
    train_and_compare(tasks, split, chosen, args)


if __name__ == "__main__":
    main()

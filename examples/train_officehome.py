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
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from report import results, table
from transformers import CLIPModel, HfArgumentParser, set_seed

from mmap_peft import MmAPConfig, MultiTaskClassifier, MultiTaskTrainer, MultiTaskTrainingArguments, load_processor
from mmap_peft.data.domains import read_domains
from mmap_peft.data.pictograms import pictogram_domains, small_clip
from mmap_peft.data.splits import has_split, make_tasks, read_lists, split_at_random, split_of_folders
from mmap_peft.hub.repository import hub_id
from mmap_peft.multitask.files import write_json


@dataclass
class ScriptArguments:
    model: str = field(
        default="openai/clip-vit-base-patch16", metadata={"help": "CLIP's name on the Hub, or a folder."}
    )
    data: str = field(default="flwrlabs/office-home", metadata={"help": "Data set's name on the Hub, or a folder."})
    split_dir: Optional[str] = field(
        default=None, metadata={"help": "Folder of published lists; needs data in a folder."}
    )
    fraction: Optional[float] = field(
        default=None, metadata={"help": "Share of the images that train. [0.1; demo: 0.3]"}
    )
    shots: Optional[int] = field(default=None, metadata={"help": "Number of training images of each class, instead."})
    num_prompts: int = field(default=4, metadata={"help": "Prompts of an adapter in each layer."})
    demo: bool = field(default=False, metadata={"help": "Pictograms and the small CLIP that ship with the package."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, MultiTaskTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        script, args = parser.parse_yaml_file(sys.argv[1])
    else:
        script, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    start = time.perf_counter()

    if script.demo:
        script.model, script.data, domains = str(small_clip()), "Pictograms", pictogram_domains()
    else:
        domains = read_domains(script.data)
    by_folders = has_split(domains) and not (script.split_dir or script.fraction or script.shots)
    if script.fraction is None and script.shots is None:
        script.fraction = 0.3 if script.demo else 0.1
    if script.split_dir and script.shots:
        raise ValueError("Published lists say which images train; write --fraction with --split_dir, not --shots.")
    if script.split_dir:
        split = read_lists(script.split_dir, script.fraction)
    elif by_folders:
        split = split_of_folders(domains)
    else:
        split = split_at_random(domains, script.fraction, script.shots, args.seed)
    tasks = make_tasks(domains, split, args.template, dataset=hub_id(script.data) or Path(script.data).name)

    clip, processor = CLIPModel.from_pretrained(script.model), load_processor(script.model)
    config = MmAPConfig(num_prompts=script.num_prompts)
    classifier = MultiTaskClassifier(clip, processor, tasks, config, seed=args.seed)
    trainer = MultiTaskTrainer(model=classifier, args=args)

    with classifier.zero_shot():
        before = trainer.evaluate(metric_key_prefix="zero_shot")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate()
    classifier.compute_prototypes(unreadable=args.unreadable)  # for images without a task

    if trainer.is_world_process_zero():
        output = Path(args.output_dir)
        classifier.save_pretrained(output)
        split.save(output / "split.json")
        seconds = round(time.perf_counter() - start, 1)
        summary = results(classifier, before, after, seed=args.seed, seconds=seconds, split=split.digest)
        write_json(summary, output / "results.json")
        print(table(summary), f"{seconds} s. Written to {output}.", sep="\n")


if __name__ == "__main__":
    main()

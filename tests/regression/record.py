"""Records what the current version saves, and what it computes from it, so that later versions can be compared.

    python -m tests.regression.record

It writes the folder `tests/regression/<version>/` and refuses to if the folder exists or if the git tree has changes
that are not committed. A recorded folder is never changed afterwards:

    base/                   a small random CLIP and its processor
    inputs.safetensors      `pixel_values` (images, 3, H, W) and `images` (images, H, W, 3) in whole numbers
    <case>/classifier/      what `MultiTaskClassifier.save_pretrained` wrote
    <case>/classifier.safetensors   `task_ids` of the images, and what `classifier_outputs` returned
    <case>/peft/            what `PeftModel.save_pretrained` wrote
    <case>/peft.safetensors         `input_ids` and `attention_mask` (texts, tokens), and what `peft_outputs` returned
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

import mmap_peft
from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CoOpConfig,
    FullFineTuningConfig,
    IVLPConfig,
    LinearProbeConfig,
    MaPLeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    Task,
    TaskGrouping,
    VPTConfig,
    ia3_config,
    ln_tuning_config,
    load_processor,
    lora_config,
)

from .outputs import classifier_outputs, load_base, peft_outputs


HERE = Path(__file__).parent
IMAGES, SIZE = 8, 48

TASKS = [
    Task("Art", ["sun", "chess queen", "cat"]),
    Task(
        "Real World",
        ["sun", "cloud", "star", "heart", "musical note"],
        template=("a picture of a {}.", "this is a small {}."),
    ),
    Task(
        "clipart",
        ["sun", "Chess_Queen", "snowflake", "crossed swords"],
        class_texts={"sun": "a yellow sun in the sky.", "snowflake": ["cold snowflake.", "a white snowflake."]},
        dataset="clipart-images",
    ),
]
THREE_CLASSES = [Task("Art", ["sun", "chess queen", "cat"]), Task("clipart", ["heart", "crossed swords", "sun"])]
ADDED = Task("Sketch", ["anchor", "gear", "chess knight"], template="a sketch of a {}.")
PLAIN_TEXTS = ["a photo of a sun.", "a chess queen.", "a small white cat on a chess king."]
PLACEHOLDER_TEXTS = ["X X X X sun.", "X X X X chess queen.", "X X X X crossed swords."]


def group_all(classifier: MultiTaskClassifier) -> None:
    """One group."""
    classifier.set_grouping(TaskGrouping.by_mode("all", list(classifier.tasks)))


def group_none(classifier: MultiTaskClassifier) -> None:
    """Each task is a group."""
    classifier.set_grouping(TaskGrouping.by_mode("none", list(classifier.tasks)))


def group_given(classifier: MultiTaskClassifier) -> None:
    """The first task is a group, all others are another."""
    first, *others = classifier.tasks
    classifier.set_grouping(TaskGrouping.by_mode("given", [first, *others], groups=[[first], others]))


def group_by_gradients(classifier: MultiTaskClassifier) -> None:
    """Groups with all that training finds out about them."""
    cosines = [[[1, 0.1, 0.7], [0.1, 1, 0.2], [0.7, 0.2, 1]], [[1, -0.3, 0.5], [-0.3, 1, 0.1], [0.5, 0.1, 1]]]
    classifier.set_grouping(TaskGrouping.from_similarity(list(classifier.tasks), cosines, steps=[5, 10]))
    classifier.record.settings = {"seed": 0, "learning_rate": 0.03}
    classifier.record.zero_shot = dict.fromkeys(classifier.tasks, 0.25)
    classifier.record.prompted = dict.fromkeys(classifier.tasks, 0.75)


@dataclass
class Case:
    """A method and how its adapters are laid out.

    Attributes:
        config: the method.
        arrange: lays the adapters out; `None`: as they are at first, which is one adapter `"global"` for all tasks.
        add_task: arguments of `add_task`, which adds one more task; `None`: none is added.
        noise: standard deviation of what is added to each parameter that trains.
        tasks: the tasks.
        texts: texts for the plain PEFT model; `None`: none is recorded.
    """

    config: PeftConfig
    arrange: Callable[[MultiTaskClassifier], None] | None = None
    add_task: dict[str, Any] | None = None
    noise: float = 0.1
    tasks: list[Task] = field(default_factory=lambda: TASKS)
    texts: list[str] | None = field(default_factory=lambda: PLAIN_TEXTS)


def mmap(arrange: Callable | None = None, config: MmAPConfig | None = None, **fields: Any) -> Case:
    """A case of MmAP. One plain PEFT model is enough for all of those with the same config."""
    plain = {} if config is not None or arrange is None else {"texts": None}
    return Case(config or MmAPConfig(num_prompts=4), arrange, noise=0.7, **{**plain, **fields})


def prompts(config: PeftConfig, arrange: Callable | None = None, add_task: dict | None = None, **fields: Any) -> Case:
    """A case of another method of prompts."""
    return Case(config, arrange, add_task, **{"noise": 0.3, "texts": PLACEHOLDER_TEXTS, **fields})


def cases() -> dict[str, Case]:
    """All cases, by name."""
    last_layer = r"(vision_model\.encoder\.layers\.1\..*|visual_projection\.weight|logit_scale)"
    return {
        "mmap_global": mmap(),
        "mmap_global_added": mmap(add_task={"group": "global"}, texts=None),
        "mmap_separate": mmap(MultiTaskClassifier.separate_adapters),
        "mmap_all": mmap(group_all, MmAPConfig(num_prompts=4, depth=2, source_shape=(4, 8))),
        "mmap_given": mmap(group_given, MmAPConfig(num_prompts=3, source_shape=(1, 4)), add_task={}),
        "mmap_gradient": mmap(group_by_gradients, add_task={"group": "clipart"}),
        "coop_end": prompts(CoOpConfig(num_prompts=4), group_given),
        "coop_end_global": prompts(CoOpConfig(num_prompts=4)),
        "coop_middle": prompts(CoOpConfig(num_prompts=4, position="middle"), group_all),
        "coop_front": prompts(CoOpConfig(num_prompts=4, position="front"), group_none),
        "coop_class_specific": prompts(
            CoOpConfig(num_prompts=4, num_classes=3), group_given, tasks=THREE_CLASSES, add_task={"group": "Art"}
        ),
        "vpt_deep": prompts(VPTConfig(num_prompts=3), group_all, texts=PLAIN_TEXTS, add_task={"group": "Art"}),
        "vpt_shallow": prompts(VPTConfig(num_prompts=3, depth=1), group_given, texts=PLAIN_TEXTS),
        "ivlp": prompts(IVLPConfig(num_prompts=4, depth=2, num_vision_prompts=3), group_given),
        "ivlp_global": prompts(IVLPConfig(num_prompts=2, vision_depth=1)),
        "maple": prompts(MaPLeConfig(num_prompts=2), group_all),
        "maple_shallow": prompts(
            MaPLeConfig(num_prompts=3, depth=1), MultiTaskClassifier.separate_adapters, add_task={}
        ),
        "linear_probe": Case(LinearProbeConfig(), texts=None, add_task={}),
        "full_fine_tuning": Case(FullFineTuningConfig(parameters=last_layer), noise=0.05),
        "bitfit": Case(BitFitConfig(), add_task={}),
        "bottleneck_adapter": Case(BottleneckAdapterConfig(bottleneck_size=4), noise=0.2),
        "lora": Case(lora_config(r=4), noise=0.3),
        "ln_tuning": Case(ln_tuning_config(), noise=0.2),
        "ia3": Case(ia3_config(), noise=0.4),
    }


def make_base(folder: Path) -> None:
    """Write a random CLIP whose weights are all large enough to matter, and its processor."""
    from mmap_peft.data.pictograms import small_clip  # here, so that the tests do not depend on where it stands

    processor = load_processor(small_clip())
    tokenizer = processor.tokenizer
    shape = {"intermediate_size": 64, "num_attention_heads": 4}
    special = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 24}
    vision = {"hidden_size": 48, "num_hidden_layers": 2, "image_size": SIZE, "patch_size": 16}
    config = CLIPConfig(text_config={**text, **shape, **special}, vision_config={**vision, **shape}, projection_dim=16)
    config.logit_scale_init_value = 1.0  # logits around 1, so that 1e-5 is no smaller than float32's own error
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)


def make_inputs() -> dict[str, torch.Tensor]:
    """Images, prepared and not."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(2, IMAGES, 3, 6, 6, generator=generator)
    pixel_values, images = (F.interpolate(part, SIZE, mode="nearest") for part in coarse)
    images = (images * 60 + 128).clamp(0, 255).to(torch.uint8)
    return {"pixel_values": pixel_values.half(), "images": images.permute(0, 2, 3, 1).contiguous()}


@torch.no_grad()
def perturb(model: torch.nn.Module, noise: float) -> None:
    """Add seeded noise to what trains, which are the adapters."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))


def record_classifier(case: Case, base: Path, folder: Path, inputs: dict[str, torch.Tensor]) -> None:
    """Save a classifier and what it computes."""
    classifier = MultiTaskClassifier(load_base(base), load_processor(base), case.tasks, copy.deepcopy(case.config))
    if case.arrange is not None:
        case.arrange(classifier)
    perturb(classifier, case.noise)
    if case.add_task is not None:
        classifier.add_task(ADDED, **case.add_task)
        perturb(classifier, case.noise)
    classifier.save_pretrained(folder / "classifier")
    task_ids = torch.arange(IMAGES) % len(classifier.tasks)
    outputs = classifier_outputs(classifier, inputs, task_ids)
    save_file({"task_ids": task_ids, **outputs}, folder / "classifier.safetensors")


def record_peft(case: Case, base: Path, folder: Path, inputs: dict[str, torch.Tensor]) -> None:
    """Save a plain PEFT model and what it computes."""
    torch.manual_seed(3)
    model = get_peft_model(load_base(base), copy.deepcopy(case.config))
    perturb(model, case.noise)
    model.save_pretrained(folder / "peft", save_embedding_layers=False)
    tokenizer = load_processor(base).tokenizer
    ids = tokenizer(case.texts, padding=True, return_tensors="pt")["input_ids"]
    # The token that ends a text also pads, so the mask cannot be read off the padding.
    ends = (ids == tokenizer.eos_token_id).int().argmax(dim=1, keepdim=True)
    texts = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) <= ends).long()}
    outputs = peft_outputs(model, inputs["pixel_values"], **texts)
    save_file({**texts, **outputs}, folder / "peft.safetensors")


def record() -> None:
    """Write all files of a version into the current folder."""
    base = Path("base")  # a relative path, since it becomes part of what is saved
    make_base(base)
    save_file(make_inputs(), "inputs.safetensors")
    inputs = load_file("inputs.safetensors")
    for name, case in cases().items():
        folder = Path(name)
        record_classifier(case, base, folder, inputs)
        if case.texts is not None:
            record_peft(case, base, folder, inputs)
    for path in [*Path().rglob("README.md"), *Path().rglob("*.png")]:
        path.unlink()  # model cards and heat maps are written for people and never loaded


def main() -> None:
    """Record the current version."""
    target = HERE / mmap_peft.__version__
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=HERE, capture_output=True, text=True, check=True)
    if changes.stdout:
        sys.exit("The git tree has changes that are not committed, so the record would be of no known code; commit.")
    if target.exists():
        sys.exit(f"Version {mmap_peft.__version__} is recorded in {target} and must stay as it is; raise the version.")
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        record()
        shutil.copytree(name, target)
        os.chdir(HERE)


if __name__ == "__main__":
    main()

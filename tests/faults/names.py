# ruff: noqa: RUF001 (letters that look like others are what is tried)
"""Tasks with nasty names: each is refused with a sentence, or trains, is saved and comes back exactly."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mmap_peft import (
    CoOpConfig,
    LinearProbeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    Task,
    TaskGrouping,
    load_processor,
    lora_config,
)
from mmap_peft.data.pictograms import small_clip
from tests.conftest import tiny_clip

from .campaigns import Campaign, one_sentence


ATTRIBUTES = sorted(name for name in {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())} if not name.startswith("_"))
WORDS = """
source scale_text scale_vision text_prompts vision_prompts proj_weight proj_bias weight bias logit_scale text_model
vision_model encoder layers embeddings class_embedding position_ids mlp fc1 fc2 q_proj out_proj layer_norm1 projection
visual_projection text_projection default model base_model mmap mmap_generators tuned tuned_parameters lora_A lora_B
lora_embedding_A base_layer adapter adapters adapter_model adapter_config modules_to_save original_module token_adapter
lora_ active_adapter active_adapters disable_adapters merged_adapters peft_config prompt_encoder bottleneck_down
bottleneck_up art clipart rt a 0 1 00 007 1e5 nan inf null true false None True self cls lambda global class def import
if not and or is in del pass yield async await print super object type int str list dict set tuple __init__ __class__
__dict__ __call__ __getattr__ __module__ _modules _parameters _buffers con nul aux prn com1 lpt1 grouping group group_0
group_1 Group_A groups checkpoint-4 checkpoint_4 runs tasks tasks.json README README.md .git . ..
./.. ../../etc/passwd / \\ // ~ ~root $HOME mean worst loss accuracy eval train test eval_art train_loss eval_loss
labels task_ids pixel_values
text_features affinity export prompts predict routes record classifier trainer adapter_set text_chunk processor
""".split()  # noqa: SIM905
STRANGE = [
    *(
        "",
        " ",
        "\t",
        "\n",
        "!",
        "%s",
        "{}",
        "{0}",
        "{name}",
        "%(name)s",
        "<art>",
        "<",
        ">",
        "<>",
        "a.b",
        "a/b",
        "a\\b",
    ),
    *(
        "a b",
        " a ",
        "a\nb",
        "a\0b",
        "a\x1bb",
        "it's",
        'say "x"',
        "`x`",
        "|",
        "a|b",
        "*",
        "?",
        ":",
        ";",
        "&amp;",
        "<b>",
    ),
    *("日本語", "中文", "العربية", "עברית", "Русский", "Ελληνικά", "हिन्दी", "ไทย", "한국어", "Café", "Cafe\u0301 2"),
    *("ﬁne", "ＦＵＬＬ", "Straße", "STRASSE 2", "İstanbul", "ı", "ǅ", "½", "²", "Ⅷ", "①", "٣", "ß", "ẞ x", "Å", "K"),
    *("🙂", "🙂 art", "\u200b", "a\u200bc", "\u202eabc", "\ufeffx", "\u0301", "e\u0301\u0301", "\ud800", "x\ud800"),
    *("x" * 200, "x" * 201, "x" * 300, "写" * 66, "写" * 67, "🙂" * 300, "x" * 100_000, "e\u0301" * 150, "a_" * 120),
]
NASTY = list(dict.fromkeys([*WORDS, *ATTRIBUTES, *STRANGE]))
METHODS = {
    "mmap": lambda: MmAPConfig(num_prompts=2),
    "coop": lambda: CoOpConfig(num_prompts=2),
    "lora": lambda: lora_config(r=2),
    "probe": LinearProbeConfig,
}
shared = SimpleNamespace()


def task(name: str) -> Task:
    return Task(name, ["sun", "cloud"])


def processor() -> Any:
    if not hasattr(shared, "processor"):
        shared.processor = load_processor(small_clip())
    return shared.processor


def accepted(names: list[str]) -> list[str]:
    """Those names that a classifier without adapters takes beside the names before them."""
    clip, kept, classifier = tiny_clip(), [], None
    for name in names:
        made = one_sentence(lambda name=name: task(name))
        if made is None:
            continue
        if classifier is None:
            classifier = one_sentence(lambda made=made: MultiTaskClassifier(clip, processor(), [made]))
            kept += [name] * (classifier is not None)
            continue
        if one_sentence(lambda made=made, classifier=classifier: classifier.check_new_task(made, ()) or True):
            classifier._enter(made, ())
            kept.append(name)
    return kept


def check(names: list[str], config: Any, rng: random.Random, folder: Path, groups: bool = False) -> None:
    """Train tasks of these names for a step, save them, load them, and compare."""
    classifier = MultiTaskClassifier(tiny_clip(), processor(), [task(name) for name in names], config)
    if classifier.uses_prompts:
        if groups:
            cut = rng.randint(1, len(names))
            classifier.set_grouping(TaskGrouping(names, [part for part in (names[:cut], names[cut:]) if part]))
        else:
            classifier.separate_adapters()
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=0.05)
    before = states(classifier)
    # Each task has an image and a label; every adapter must get a gradient from them.
    batch = {
        "pixel_values": torch.randn(len(names), 3, 48, 48, generator=generator),
        "task_ids": torch.arange(len(names)),
    }
    classifier.train()
    classifier(**batch, labels=torch.randint(2, (len(names),), generator=generator)).loss.backward()
    optimizer.step()
    after = states(classifier)
    assert list(after) == classifier.adapters
    for adapter, tensors in after.items():
        assert tensors, f"{adapter!r} has no tensors"
        assert any(not torch.equal(tensors[key], before[adapter][key]) for key in tensors), f"{adapter!r} is as before"
    logits = answer(classifier, batch)
    assert logits[:, :2].isfinite().all()
    classifier.save_pretrained(folder)
    again = MultiTaskClassifier.from_pretrained(folder, model=tiny_clip(), processor=processor())
    assert list(again.tasks) == names and again.routes == classifier.routes and again.adapters == classifier.adapters
    assert torch.equal(answer(again, batch), logits), "loaded adapters predict otherwise"
    for adapter, tensors in states(again).items():
        assert tensors.keys() == after[adapter].keys()
        assert all(torch.equal(tensors[key], after[adapter][key]) for key in tensors), f"{adapter!r} is not as saved"


def states(classifier: MultiTaskClassifier) -> dict[str, dict[str, torch.Tensor]]:
    names = classifier.adapters
    return {name: {key: tensor.clone() for key, tensor in classifier.adapter_state(name).items()} for name in names}


def answer(classifier: MultiTaskClassifier, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), classifier.evaluating():
        return classifier(**batch).logits


def draw(rng: random.Random) -> str:
    """A name of the list, two of them joined, or some characters of Unicode."""
    kind = rng.randrange(4)
    if kind < 2:
        return rng.choice(NASTY)
    if kind == 2:
        return rng.choice(NASTY) + rng.choice("_.- /<>") + rng.choice(NASTY)
    highest = rng.choice((128, 0x600, 0xFFFF, sys.maxunicode))
    return "".join(chr(rng.randrange(1, highest)) for _ in range(rng.randint(1, 12)))


def trial(rng: random.Random, folder: Path) -> None:
    names = list(dict.fromkeys(draw(rng) for _ in range(8)))
    kept = accepted(names)
    method = rng.choice(list(METHODS))
    if not kept:
        return
    # A new classifier takes or refuses them as `accepted` says; then all of them train.
    if len(names) > len(kept):
        refused = rng.choice([name for name in names if name not in kept])
        made = one_sentence(lambda: [task(name) for name in [*kept, refused]])
        clip = tiny_clip()
        state = copy.deepcopy(clip.state_dict())
        one = made and one_sentence(lambda: MultiTaskClassifier(clip, processor(), made, METHODS[method]()))
        assert not one and list(state) == list(clip.state_dict()), f"{refused!r} is taken, or left something behind"
    check(kept, METHODS[method](), rng, folder, groups=rng.random() < 0.5)


CAMPAIGN = Campaign(trial, trials=100, few=8, prepare=processor)

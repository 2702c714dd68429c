"""Settings of all methods are replaced by others, good and bad: they work, or a sentence names one of them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CLIPAdapterConfig,
    CoOpConfig,
    FullFineTuningConfig,
    IVLPConfig,
    LinearProbeConfig,
    MaPLeConfig,
    MmAPConfig,
    MMRLTokensConfig,
    MultiTaskClassifier,
    PromptSRCConfig,
    Task,
    VPTConfig,
    ia3_config,
    ln_tuning_config,
    load_processor,
    lora_config,
)
from mmap_peft.data.pictograms import small_clip
from tests.conftest import tiny_clip

from .campaigns import Campaign, one_sentence


CONFIGS = [
    *(MmAPConfig, CoOpConfig, VPTConfig, IVLPConfig, PromptSRCConfig, MMRLTokensConfig, MaPLeConfig),
    *(BitFitConfig, FullFineTuningConfig, BottleneckAdapterConfig, CLIPAdapterConfig, LinearProbeConfig),
    *(lora_config, ln_tuning_config, ia3_config),
]
OF_PEFT = ["task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"]
LORA = "r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save "
LORA += "init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern use_dora lora_bias"
FIELDS = {
    lora_config: LORA.split(),
    ln_tuning_config: ["target_modules", "exclude_modules", "modules_to_save"],
    ia3_config: ["target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"],
}
NUMBERS = [0, 1, 2, 3, 4, 5, 8, 16, 17, 18, 19, 20, 64, 1000, 2**31, 10**9, 2**63, 10**30, 10**5000, -1, -(2**70)]
FLOATS = [0.0, 1e-30, 1e-9, 0.02, 0.5, 1.0, 2.0, 50.0, 1e30, 1e308, -0.1, float("nan"), float("inf"), float("-inf")]
WORDS = ["", "a", "none", "all", "1", "end", "middle", "front", "lora_only", "é" * 1000, "x" * 100_000, "a\nb", "None"]
PATTERNS = [
    *(
        r".*encoder\.layers\.\d+",
        r".*encoder\.layers\.1",
        r"text_model\.encoder\.layers\.\d",
        ".*fc1",
        ".*q_proj",
        "q_proj",
    ),
    *(
        "(",
        "[",
        "*",
        "(?P<x",
        ".*",
        "nothing",
        ".*bias",
        ".*layer_norm1",
        r".*\.embeddings",
        "vision_model.*",
        "all-linear",
    ),
]
LISTS = [
    *([], [""], ["fc1"], ["q_proj", "v_proj"], ["visual_projection"], ["encoder"], ["layers"], ["mmap"], ["e"], ["0"]),
    *(
        [1],
        [None],
        ["nothing"],
        [[]],
        [True],
        [0, 1],
        [1, 2, 3, 4],
        [-1],
        [10**9] * 4,
        [400] * 4,
        [1.5] * 4,
        ["x"] * 4,
    ),
    *([0] * 10_000, ["x" * 1000] * 100, ["logit_scale"], ["default"], ["text_model"], ["mmap_generators"]),
]
OTHERS = [
    *(None, True, False, (), (2, 2), (2, 8), (4, 4), (0, 2), (2,), (2, 2, 2), ("2", "2"), (2.0, 2), (True, 2), (3, 5)),
    *({}, {"a": 1}, {"q_proj": 2}, {"q_proj": -1}, {"q_proj": "x"}, {1: 2}, {"(": 2}, set(), {"fc1"}, {1}, b"x", 1j),
    *(object(), nn.Linear(2, 2), torch.zeros(2), int, lambda: 1, "gaussian", "pissa", "olora", "loftq", "eva"),
]
POOL = [NUMBERS, FLOATS, WORDS, PATTERNS, LISTS, OTHERS]
# Of methods whose defaults do not fit a tiny CLIP.
FITTING: dict[Any, dict[str, int]] = {PromptSRCConfig: {"depth": 2}, MMRLTokensConfig: {"first_layer": 1}}
shared = SimpleNamespace()


def prepare() -> None:
    shared.processor = load_processor(small_clip())
    shared.tasks = [Task("art", ["sun", "cloud"]), Task("photo", ["sun", "cloud"])]
    ids = shared.processor.tokenizer(["X " * 16 + "sun", "X " * 16 + "cloud"], return_tensors="pt")["input_ids"]
    shared.pixels = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    shared.inputs = {"input_ids": ids, "pixel_values": shared.pixels}


def state(clip: nn.Module) -> dict[str, Any]:
    """All that a refusal must leave as it is."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in clip.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in clip.named_parameters()},
        "modules": [(name, type(module), module.training) for name, module in clip.named_modules()],
        "hooks": [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in clip.modules()],
        "config": getattr(clip, "peft_config", None),
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    tensors = before.pop("tensors"), after.pop("tensors")
    equal = tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(each, tensors[1][k]) for k, each in tensors[0].items()
    )
    return equal and before == after


def draw(rng: random.Random) -> tuple[Any, dict[str, Any]]:
    """A config and one or two of its settings."""
    make = rng.choice(CONFIGS)
    fields = FIELDS.get(make) or [
        field.name for field in dataclasses.fields(make) if field.name not in (*OF_PEFT, "peft_type")
    ]
    names = (
        rng.sample(fields, min(len(fields), rng.choice((1, 1, 2)))) if rng.random() < 0.9 else [rng.choice(OF_PEFT)]
    )
    return make, {name: rng.choice(rng.choice(POOL)) for name in names}


def trial(rng: random.Random, folder: Path) -> None:
    make, values = draw(rng)
    names, fitting = list(values), FITTING.get(make, {})
    if rng.random() < 0.2:
        config = make(**fitting)  # changed after it was made
        for name, value in values.items():
            setattr(config, name, value)
    else:
        config = one_sentence(lambda: make(**{**fitting, **values}), *names)
        if config is None:
            return
    clip = tiny_clip()
    before = state(clip)
    alone = make in CONFIGS[:8] and rng.random() < 0.4
    run = with_peft if alone else with_tasks
    if one_sentence(lambda: run(clip, config, folder) or True, *names) is None:
        assert same(before, state(clip)), f"{values} was refused, but changed the model"


def with_peft(clip: nn.Module, config: Any, folder: Path) -> None:
    """One adapter of one model."""
    model = get_peft_model(clip, config)
    if getattr(config, "num_classes", None) not in (None, 2):
        return
    try:
        first = model.train()(**shared.inputs).logits_per_image
    except ValueError as error:  # a text that is too short for the prompts is no fault of the settings
        assert "write a word for each prompt" in str(error)
        return
    after(model, first, lambda: model.eval()(**shared.inputs).logits_per_image)
    with torch.no_grad():
        logits = model.eval()(**shared.inputs).logits_per_image
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(tiny_clip(), folder).eval()
    with torch.no_grad():
        assert torch.equal(again(**shared.inputs).logits_per_image, logits), "the loaded adapter predicts otherwise"


def with_tasks(clip: nn.Module, config: Any, folder: Path) -> None:
    """A classifier of two tasks."""
    classifier = MultiTaskClassifier(clip, shared.processor, shared.tasks, config)
    batch = {"pixel_values": shared.pixels, "task_ids": torch.tensor([0, 0, 1, 1])}
    output = classifier.train()(**batch, labels=torch.tensor([0, 1, 0, 1]))
    after(classifier, output.logits, lambda: classifier.eval()(**batch).logits)
    with torch.no_grad():
        logits = classifier.eval()(**batch).logits
    classifier.save_pretrained(folder)
    again = MultiTaskClassifier.from_pretrained(folder, model=tiny_clip(), processor=shared.processor)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, logits), "the loaded classifier predicts otherwise"


def after(model: nn.Module, logits: torch.Tensor, evaluate: Any) -> None:
    """One step; what comes out is finite before and after."""
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert logits.isfinite().all(), "the first output is not finite"
    if training:
        logits.logsumexp(-1).sum().backward()
        torch.optim.AdamW(training, lr=1e-3).step()
    with torch.no_grad():
        assert evaluate().isfinite().all(), "the output after one step is not finite"


CAMPAIGN = Campaign(trial, trials=400, few=25, prepare=prepare)

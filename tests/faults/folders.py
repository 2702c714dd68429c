"""Damaged folders load and predict as the undamaged ones, or a sentence says what is wrong."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mmap_peft import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CLIPAdapterConfig,
    CoOpConfig,
    LinearProbeConfig,
    MaPLeConfig,
    MmAPConfig,
    MultiTaskClassifier,
    TaskGrouping,
    TipAdapterConfig,
    ln_tuning_config,
    load_processor,
    lora_config,
)
from mmap_peft.data.pictograms import draw, small_clip
from tests.conftest import make_task, tiny_clip

from .campaigns import Campaign, one_sentence


IMAGES = [draw("print", "sun", number) for number in range(2)]
CONFIGS = [
    MmAPConfig(num_prompts=4, source_shape=(2, 4)),
    CoOpConfig(num_prompts=2),
    MaPLeConfig(num_prompts=2),
    lora_config(r=2),
    ln_tuning_config(),
    BitFitConfig(),
    BottleneckAdapterConfig(bottleneck_size=2),
    LinearProbeConfig(),
    CLIPAdapterConfig(),
    TipAdapterConfig(train_keys=True),
]
VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    2**63,
    "",
    "x",
    "../x",
    [],
    {},
    [1],
    ["a"],
    {"a": 1},
    [[]],
    "\u202e",
    "a" * 10000,
]
shared = SimpleNamespace()


def make(config: Any) -> MultiTaskClassifier:
    """A classifier with random weights."""
    classifier = MultiTaskClassifier(tiny_clip(), load_processor(small_clip()), shared.tasks, config)
    if isinstance(config, TipAdapterConfig):
        classifier.fill_caches()
    if classifier.uses_prompts:
        names = list(classifier.tasks)
        snapshots = torch.eye(2, dtype=torch.float64).expand(2, 2, 2).numpy()
        found = {"affinity": "directions", "reliability": [0.5, 0.25], "together": snapshots[0], "stability": 0.5}
        settings = [1, 2], 0.5, "gradient", 0.1
        classifier.set_grouping(TaskGrouping(names, [names], snapshots.mean(0), snapshots, *settings, **found))
    with torch.no_grad():
        for adapter in classifier.adapters:
            for parameter in classifier.adapter_parameters(adapter).values():
                parameter.add_(torch.randn(parameter.shape) / 10)
    classifier.compute_prototypes()
    return classifier.eval()


def prepare() -> None:
    shared.tasks = [make_task("print", 3), make_task("photo", 4)]
    shared.folder = Path(tempfile.mkdtemp(prefix="fault_healthy_"))
    shared.classifiers = []
    for number, config in enumerate(CONFIGS):
        torch.manual_seed(number)
        shared.classifiers.append(make(config))
        shared.classifiers[-1].save_pretrained(shared.folder / str(number))
    shared.states = [state(classifier) for classifier in shared.classifiers]


def state(classifier: MultiTaskClassifier) -> list:
    probabilities = torch.cat([classifier.predict(IMAGES, name).probabilities for name in classifier.tasks], 1)
    assert probabilities.isfinite().all(), "a prediction is not finite"
    grouping = None if classifier.grouping is None else classifier.grouping.to_dict()
    routed = None if classifier.prototypes is None else classifier.predict(IMAGES).probabilities
    assert routed is None or routed.isfinite().all(), "a prediction is not finite"
    routed = None if routed is None else routed.tolist()
    return [probabilities.tolist(), list(classifier.adapters), dict(classifier.routes), grouping, routed]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The ways that lead to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, each in items for place in places(each, (*path, key))]


def change_json(rng: random.Random, path: Path) -> None:
    content = json.loads(path.read_text())
    *above, last = rng.choice(places(content))
    owner = content
    for key in above:
        owner = owner[key]
    way = rng.choice(["value", "value", "value", "remove", "rename", "double"])
    if way == "value":
        owner[last] = copy.deepcopy(rng.choice(VALUES))
    elif way == "double" and isinstance(owner, list):
        owner.append(copy.deepcopy(owner[last]))
    elif way == "rename" and isinstance(owner, dict):
        owner[last + "_"] = owner.pop(last)
    else:
        del owner[last]
    path.write_text(json.dumps(content))


def change_text(rng: random.Random, path: Path) -> None:
    text = path.read_text()
    way = rng.choice(["utf-16", "latin-1", "bom", "deep", "nan", "infinity", "twice", "surrogate", "large"])
    if way in ("utf-16", "latin-1"):
        path.write_bytes(text.replace("a", "é").encode(way))
    elif way == "bom":
        path.write_bytes(text.encode("utf-8-sig"))
    elif way == "deep":
        path.write_text(text.rstrip()[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    elif way == "twice":
        path.write_text(
            text.rstrip()[:-1] + ', "adapters": ["x"], "peft_type": "LORA", "adapters": ["y"], "peft_type": 1}'
        )
    elif way == "large":
        with open(path, "r+b") as file:
            file.truncate(65 * 2**20)
    else:
        value = {"nan": "NaN", "infinity": "1e999", "surrogate": '"\\ud800"'}[way]
        content = json.loads(text)
        *above, last = rng.choice([place for place in places(content) if isinstance(place[-1], str | int)])
        owner = content
        for key in above:
            owner = owner[key]
        owner[last] = "@@"
        path.write_text(json.dumps(content).replace('"@@"', value))


def change_bytes(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    way = rng.choice(["flip", "flip", "cut", "empty", "longer", "zeros"])
    at = rng.randrange(len(content))
    if way == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif way == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    else:
        content = {"cut": content[:at], "empty": b"", "longer": content + b"\0" * 8}[way]
    path.write_bytes(content)


def change_tensors(rng: random.Random, path: Path) -> None:
    tensors = load_file(path)
    name = rng.choice(sorted(name for name, tensor in tensors.items() if tensor.dim()))
    way = rng.choice(["nan", "infinity", "dtype", "shape", "extra", "remove", "rename"])
    if way in ("nan", "infinity"):
        tensors[name].view(-1)[0] = float(way)
    elif way == "dtype":
        tensors[name] = tensors[name].to(rng.choice([torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]))
    elif way == "shape":
        tensors[name] = rng.choice([tensors[name][:1], tensors[name][None], tensors[name].flatten()]).clone()
        tensors[name] = torch.cat([tensors[name].flatten()] * 2)
    elif way == "extra":
        tensors[name + ".extra"] = torch.zeros(2)
    else:
        tensor = tensors.pop(name)
        if way == "rename":
            tensors[name + "x"] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def change_kind(rng: random.Random, path: Path) -> None:
    """Remove a file, or put something else in its place."""
    path.unlink()
    way = rng.choice(["nothing", "folder", "fifo", "device", "dangling", "loop"])
    if way == "folder":
        path.mkdir()
    elif way == "fifo":
        os.mkfifo(path)
    elif way != "nothing":
        path.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "loop": path.name}[way])


def forget_digests(folder: Path) -> None:
    """As if the folder had been saved by an early version."""
    path = folder / "tasks.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in ("files", "sha256")}))


def damage(rng: random.Random, folder: Path) -> str:
    configs, weights = sorted(folder.glob("*/*.json")), sorted(folder.rglob("*.safetensors"))
    texts = [folder / "tasks.json"] * 3 + configs
    everything = [folder / "tasks.json", *configs, *weights]
    changes: dict[Callable, list[Path]] = {
        change_json: texts,
        change_text: texts,
        change_bytes: everything,
        change_tensors: weights,
        change_kind: everything,
    }
    change = rng.choice([change_json, change_json, *changes])
    path = rng.choice(changes[change])
    change(rng, path)
    return f"{change.__name__} {path.relative_to(folder)}"


def load(number: int, folder: Path, verify: bool) -> MultiTaskClassifier:
    return MultiTaskClassifier.from_pretrained(
        folder, model=tiny_clip(), processor=load_processor(small_clip()), verify=verify
    )


def trial(rng: random.Random, folder: Path) -> None:
    number = rng.randrange(len(CONFIGS))
    damaged = shutil.copytree(shared.folder / str(number), folder / "damaged")
    digests = rng.random() < 0.5
    if not digests:
        forget_digests(damaged)
    if rng.random() < 0.1 and len(list(damaged.glob("*/*.safetensors"))) > 1:
        first, second = rng.sample(sorted(damaged.glob("*/*.safetensors")), 2)
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
        what = "swapped"
    else:
        what = damage(rng, damaged)
    verify = rng.random() < 0.8
    names = (
        "tasks.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "prototypes.safetensors",
        "affinity.safetensors",
        "damaged",
    )
    try:
        loaded = one_sentence(lambda: load(number, damaged, verify), *names)
        live = shared.classifiers[number]
        answer = one_sentence(lambda: live.load_adapters(damaged, verify=verify) or True, *names)
        if answer is None:
            assert state(live) == shared.states[number], "a folder was refused, but something has changed"
        elif digests and verify:
            assert state(live) == shared.states[number], "a damaged folder was loaded"
        else:
            one_sentence(lambda: state(live), "not finite")
        if loaded is not None and digests and verify:
            assert state(loaded) == shared.states[number], "a damaged folder was loaded"
        elif loaded is not None:
            one_sentence(lambda: state(loaded), "not finite")
    except BaseException as error:
        error.add_note(f"{type(CONFIGS[number]).__name__}, {what}, digests {digests}, verify {verify}")
        raise


CAMPAIGN = Campaign(trial, trials=330, few=15, prepare=prepare, seconds=30)

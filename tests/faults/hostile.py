"""Folders that were made to do harm: a sentence says what is wrong, and nothing runs, is written, or takes memory."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from mmap_peft import MmAPConfig, MultiTaskClassifier, Task, load_processor
from mmap_peft.data.pictograms import small_clip
from tests.conftest import tiny_clip

from . import folders
from .campaigns import Campaign, one_sentence


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
LONG = (
    "(a+)+$",
    r"(.*\.)*(.*\.)*(.*\.)*x",
    "(a|a)*b",
    "(x*)*(x*)*y",
    "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)z",
    r"(.)\1*" * 9,
)
NAMES = [
    "<script>alert(1)</script>", "a | b | c", "line\nbreak", "{{ 7 * 7 }}", "{% include 'x' %}",
    "[x](http://evil.example)",
    "http://evil.example", "www.evil.example", "mail@evil.example", "\u202egnp.exe", "# head", "```\ncode", "![x](y)",
    "'); import os; os.system('id", '"\n---\nlicense: mit\n---\n', "a\u200bb",
    "<!-- c -->", "&lt;b&gt;", "\\", "~~x~~",
]  # fmt: skip


def executes() -> Any:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.system, ("touch executed",)

    return Payload()


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def setting(name: str, value: Any) -> Callable[[random.Random, Path], None]:
    """Set a setting of all adapters."""

    def change(rng: random.Random, folder: Path) -> None:
        for path in folder.glob("*/adapter_config.json"):
            edit(path, lambda content: content.update({name: value}))

    return change


def described(**values: Any) -> Callable[[random.Random, Path], None]:
    return lambda rng, folder: edit(folder / "tasks.json", lambda content: content.update(values))


def base(**values: Any) -> Callable[[random.Random, Path], None]:
    return lambda rng, folder: edit(folder / "tasks.json", lambda content: content["base"].update(values))


def in_place(content: Callable[[], bytes], name: str = "adapter_model.safetensors") -> Callable:
    def change(rng: random.Random, folder: Path) -> None:
        for path in folder.glob("*/adapter_model.safetensors"):
            path.with_name(name).write_bytes(content())

    return change


def header(shape: list[int], offsets: list[int], size: int | None = None) -> Callable[[], bytes]:
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return lambda: struct.pack("<Q", len(text) if size is None else size) + text + bytes(16)


def linked(target: str) -> Callable[[random.Random, Path], None]:
    def change(rng: random.Random, folder: Path) -> None:
        path = rng.choice([folder / "tasks.json", *folder.glob("*/adapter_*")])
        path.unlink()
        path.symlink_to(target)

    return change


def renamed(name: str) -> Callable[[random.Random, Path], None]:
    """Give an adapter a name that is a path."""

    def change(rng: random.Random, folder: Path) -> None:
        content = json.loads((folder / "tasks.json").read_text())
        old = content["adapters"][-1]
        (folder / "tasks.json").write_text(json.dumps(content).replace(f'"{old}"', json.dumps(name)))

    return change


def fifo(rng: random.Random, folder: Path) -> None:
    path = rng.choice([folder / "tasks.json", *folder.glob("*/adapter_*")])
    path.unlink()
    os.mkfifo(path)


def huge_tensors(rng: random.Random, folder: Path) -> None:
    """Settings and tensors that agree with each other, but not with the base."""
    for path in folder.glob("*/adapter_model.safetensors"):
        tensors = {name: torch.zeros(3000, *tensor.shape[1:]) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    for name in ("num_prompts", "r", "bottleneck_size"):
        setting(name, 3000)(rng, folder)


def filled(value: float, dtype: torch.dtype) -> Callable[[random.Random, Path], None]:
    """Give all tensors one value."""

    def change(rng: random.Random, folder: Path) -> None:
        for path in folder.glob("*/adapter_model.safetensors"):
            tensors = {name: torch.full(each.shape, value, dtype=dtype) for name, each in load_file(path).items()}
            save_file(tensors, path, metadata={"format": "pt"})

    return change


def several(**settings: Any) -> Callable[[random.Random, Path], None]:
    """Settings that PEFT takes together only."""

    def change(rng: random.Random, folder: Path) -> None:
        for name, value in settings.items():
            setting(name, value)(rng, folder)

    return change


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "pickle as weights": in_place(lambda: pickle.dumps(executes())),
    "pickle beside": in_place(lambda: pickle.dumps(executes()), "adapter_model.bin"),
    "header of a huge shape": in_place(header([2**40, 2**20], [0, 16])),
    "header of a huge size": in_place(header([4], [0, 16], 2**60)),
    "offsets beyond the file": in_place(header([2**30], [0, 2**32])),
    "negative offsets": in_place(header([4], [-16, 0])),
    "deep": lambda rng, folder: (folder / "tasks.json").write_text("[" * 100_000),
    "deep settings": in_place(lambda: b'{"a":' * 100_000, "adapter_config.json"),
    "large": lambda rng, folder: os.truncate(folder / "tasks.json", 65 * 2**20),
    "many digits": described(adapters=int("9" * 4000)),
    "fifo": fifo,
    "endless": linked("/dev/zero"),
    "random": linked("/dev/urandom"),
    "process": linked("/proc/self/mem"),
    "huge tensors": huge_tensors,
    "beyond the dtype": filled(1e300, torch.float64),
    "pattern of layers": several(
        target_modules=["q_proj", "v_proj"], layers_to_transform=[0], layers_pattern=["(a+)+$", r"(\w+\.?)+#"]
    ),
    "patterns in lists": several(target_modules=["q_proj", r"(\w+\.?)+#"], modules_to_save=["((a*)*)*b"]),
    "half a character": described(training={"settings": {"\ud800": "\udfff"}}),
    "huge accuracy": described(training={"prompted": {"print": 10**400, "photo": 0.5}}),
    "image size": base(image_processor={"size": {"shortest_edge": 10**6}}),
    "crop size": base(image_processor={"crop_size": {"height": 10**6, "width": 10**6}}),
    "image settings": base(image_processor={"size": "x", "do_resize": [], "y": 1}),
    "image class": base(image_processor_class="os.system", image_processor={"image_processor_type": "x"}),
    "base's dtype": base(dtype="int8"),
    "base's folder": base(subfolder="../../..", revision="../x"),
    "base's address": described(base_model="../../../etc", base=None),
    "files": described(files={"../../etc/passwd": "0" * 64, "/etc/passwd": 1}),
    **{f"path {name}": renamed(name) for name in ("../x", "/etc", "C:\\x", "a/b", "..", "", "x\0y", "a" * 300)},
    **{
        f"{name}={str(value)[:30]}": setting(name, value)
        for name, values in {
            "num_prompts": (10**9, 10**30, -1),
            "r": (10**6, 10**12),
            "rank_pattern": ({".*": 10**6}, {"(a+)+$": 2}),
            "bottleneck_size": (10**9,),
            "num_classes": (10**9, 50_000),
            "source_shape": ([10**6, 10**6], [2, 10**9]),
            "depth": (10**9,),
            "target_modules": LONG,
            "exclude_modules": LONG[:2],
            "parameters": LONG[:3],
            "peft_type": ("XLORA", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "POLY", "x", 1, None),
            "auto_mapping": ({"base_model_class": "system", "parent_library": "os"},),
            "megatron_config": ({"a": 1},),
            "init_lora_weights": ("pissa", "eva", "loftq", "x"),
            "modules_to_save": (["text_model"], [".*"], "x"),
            "layers_pattern": ("(a+)+$",),
            "runtime_config": ({"ephemeral_gpu_offload": True},),
            "trust_remote_code": (True,),
            "trainable_token_indices": ([10**9], {"token_embedding": [10**9]}),
            "init_ids": ([10**9] * 4, [-1] * 4),
            "task_type": ("CAUSAL_LM",),
        }.items()
        for value in values
    },
}  # fmt: skip


def watch(folder: Path) -> list[str]:
    """A list that gets what happens from now on and should not."""
    found: list[str] = []
    bad = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.fork", "pty.spawn")

    def event(name: str, details: tuple) -> None:
        writes = name == "open" and isinstance(details[2], int) and details[2] & WRITES
        inside = str(details[0]).startswith((str(folder), "/dev/null", "/tmp/tmp")) if details else False
        if name in bad or (writes and not inside):
            found.append(f"{name} {str(details)[:200]}")

    sys.addaudithook(event)
    return found


def names(rng: random.Random, folder: Path) -> None:
    """Names that a card shows as they are, and nothing else."""
    chosen = rng.sample(NAMES, 3)
    tasks = []
    for number, name in enumerate(chosen):
        classes = [f"{name} {each}" for each in "ab"]
        tasks.append(Task(f"task{number} {name}", classes, class_texts=dict.fromkeys(classes, "a thing")))
    classifier = MultiTaskClassifier(tiny_clip(), load_processor(small_clip()), tasks, MmAPConfig())
    classifier.save_pretrained(folder / "named")
    card = (folder / "named" / "README.md").read_text()
    assert "\u202e" not in card, "text runs from right to left"
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---", 2)[2])
    for wrong in (
        "<script",
        'evil.example">',
        "http://evil",
        "www.evil",
        "mail@",
        "49 ",
        "<img",
        "<!-- c",
        "<h1>head",
    ):
        assert wrong not in re.sub("<code.*?</code>", "", html, flags=re.DOTALL), f"{wrong!r} in the card"
    again = folders.load(0, folder / "named", True)
    assert list(again.tasks) == list(classifier.tasks)


def trial(rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.05:
        names(rng, folder)
        return
    kind = rng.choice(sorted(KINDS))
    number = rng.randrange(len(folders.CONFIGS))
    hostile = shutil.copytree(folders.shared.folder / str(number), folder / "hostile")
    if rng.random() < 0.8:
        folders.forget_digests(hostile)
    KINDS[kind](rng, hostile)
    os.chdir(folder)
    seen = watch(folder)
    try:
        loaded = one_sentence(lambda: folders.load(number, hostile, rng.random() < 0.5))
        live = folders.shared.classifiers[number]
        if one_sentence(lambda: live.load_adapters(hostile) or True) is None:
            assert folders.state(live) == folders.shared.states[number], (
                "a folder was refused, but something has changed"
            )
        if loaded is not None:
            assert folders.state(loaded)[0] == folders.shared.states[number][0], "other predictions"
        assert not seen, seen
        assert {path.name for path in folder.iterdir()} == {"hostile"}, "something was written"
    except BaseException as error:
        error.add_note(f"{kind}, {type(folders.CONFIGS[number]).__name__}")
        raise


CAMPAIGN = Campaign(trial, trials=240, few=12, prepare=folders.prepare, seconds=20, memory=2**30)

"""Measuring steps whose image features are kept (`cache_features`), beside those that compute them each time."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel

from mmap_peft.data.pictograms import small_clip
from mmap_peft.methods.linear_probe import LinearProbeConfig
from mmap_peft.multitask.files import write_json
from mmap_peft.multitask.loading import load_processor
from mmap_peft.prompts.coop import CoOpConfig
from mmap_peft.prompts.mmap import MmAPConfig

from .internals import KeptStates
from .machine import origin
from .speed_plots import plot_cached
from .steps import Setting, precision, random_clip
from .tables import cell, head_lines, table_lines
from .timing import Runs, measure_runs, ratio


LAYERS = (0, 3, 6, 9)  # the first of 12 that gets prompts
# suffixes of the names of runs whose image features are read from files, or written to them
KEPT, FIRST = ", kept", ", first"
RUNS = {
    "floor": "the image tower alone, forward and backward to the pixels",
    "layer k": "forward and backward of `MultiTaskClassifier` with MmAP from layer k on, as `step` of speed.md",
    "coop images": "the image part of CoOp, which has no gradient",
    "probe": "forward and backward with linear probes",
    "practice": "the common practice of speed.md with prompts in all layers",
    f"...{KEPT}": "the same with what enters the first layer that adapters change read from files, checksums included",
    f"...{FIRST}": "the same as these files are written, in the first epoch",
}


def measure_cached(
    out: Path,
    batches: Sequence[int],
    tasks: Sequence[int] = (1, 4),
    classes: int = 65,
    repeats: int = 5,
    shape: str = "ViT-B/16",
) -> str:
    """Measure training steps with and without kept image features, with a CLIP of random weights. Writes `cached.json`
    after each setting, and `cached.md` and `cached.png` at the end. The picture also has the accuracies of the study
    `first_layer`.

    Args:
        out (`Path`): folder of these files.
        batches, tasks: numbers of images and of tasks; each pair is a setting. The first also has the `practice`.
        classes, repeats (`int`): classes of each task, and how often each time is taken.
        shape (`str`): one of `SHAPES`.

    Returns:
        The text of `cached.md`.
    """
    settings = {"shape": shape, "precision": precision(), "repeats": repeats, "classes": classes}
    measurement: dict[str, Any] = {**origin(), "settings": settings, "cached": []}
    out.mkdir(parents=True, exist_ok=True)
    processor = load_processor(small_clip())
    clip = random_clip(shape, processor.tokenizer)
    plan = list(itertools.product(batches, tasks))
    with tqdm(total=len(plan), disable=None, unit="setting") as bar:
        for batch, count in plan:
            times = measure_runs(_runs(clip, processor, batch, count, classes, (batch, count) == plan[0]), repeats)
            ratios = {name: ratio(times["seconds"], name, "floor") for name in times["seconds"]}
            measurement["cached"].append({"batch": batch, "tasks": count, **times, "ratios": ratios})
            write_json(measurement, out / "cached.json")
            bar.update()
    text = cached_text(measurement)
    (out / "cached.md").write_text(text)
    depth, title = clip.config.vision_config.num_hidden_layers, f"Prompts from layer k on: {shape}, {precision()}"
    plot_cached(measurement["cached"], depth, _accuracies(), title, out / "cached.png")
    return text


def _accuracies() -> dict[float, float]:
    """Accuracies of the study `first_layer`, by the share of the layers that come before the first with prompts."""
    choices = json.loads((Path(__file__).parent / "results" / "first_layer" / "choices.json").read_text())
    tried = choices["first_layer_mmap"]["tried"]
    depth = CLIPConfig.from_pretrained(small_clip()).vision_config.num_hidden_layers
    return {one["point"]["config.first_layer"] / depth: one["accuracy"] for one in tried}


def _runs(clip: CLIPModel, processor: Any, batch: int, tasks: int, classes: int, with_practice: bool) -> Runs:
    """The functions to measure, by name."""

    def setting(config: Any) -> Setting:
        return Setting(clip, processor, batch, tasks, classes, config)

    runs: Runs = {}
    depth = clip.config.vision_config.num_hidden_layers
    for layer in dict.fromkeys(number * depth // 12 for number in LAYERS):
        steps = setting(MmAPConfig(first_layer=layer))
        runs[f"layer {layer}"] = steps.step
        if layer:
            runs |= _with_kept(f"layer {layer}", steps)
        else:
            runs = {"floor": steps.floor, **({"practice": steps.practice(False)} if with_practice else {}), **runs}
    coop, probe = setting(CoOpConfig()), setting(LinearProbeConfig())
    kept = KeptStates(coop.classifier, coop.images["pixel_values"])
    runs["coop images"] = functools.partial(_image_features, coop, lambda: coop.images["pixel_values"])
    runs[f"coop images{KEPT}"] = functools.partial(_image_features, coop, kept)
    return {**runs, "probe": probe.step, **_with_kept("probe", probe)}


def _with_kept(name: str, setting: Setting) -> Runs:
    kept = KeptStates(setting.classifier, setting.images["pixel_values"])

    def step(states: Any) -> None:
        setting.step(lambda **images: setting.classifier(**{**images, "pixel_values": states()}))

    return {f"{name}{KEPT}": lambda: step(kept), f"{name}{FIRST}": lambda: step(kept.compute)}


@torch.no_grad()
def _image_features(setting: Setting, images: Any) -> torch.Tensor:
    route = next(iter(setting.classifier.routes.values()))
    numbers = torch.zeros_like(setting.images["task_ids"])
    with setting.autocast():
        return setting.classifier.image_features(images(), [route], numbers)


def cached_text(measurement: dict[str, Any]) -> str:
    """The text of `cached.md` from the fields of `cached.json`."""
    settings = measurement["cached"]
    lines = [
        *head_lines("Kept image features", measurement),
        *(f"* {name}: {what}" for name, what in RUNS.items()),
        "",
    ]
    heads = [f"batch {one['batch']}, tasks {one['tasks']}" for one in settings]
    for title, key, form in (
        ("time / floor", "ratios", lambda value: f"{value:.2f}"),
        ("ms", "median", lambda value: cell(value, 1e3)),
        ("MB", "peak_bytes", lambda value: cell(value, 1e-6)),
    ):
        names = list(settings[0][key])
        rows = [[name, *(form(one[key][name]) if name in one[key] else "" for one in settings)] for name in names]
        lines += [*table_lines([title, *heads], rows), ""]
    return "\n".join(lines)

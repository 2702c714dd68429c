"""What a step and a prediction cost beside the plain image tower and beside the common practice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmap_peft.data.pictograms import small_clip
from mmap_peft.multitask.files import write_json
from mmap_peft.multitask.record import versions
from mmap_peft.multitask.saving import load_processor

from .measure import commit, machine
from .report import origin
from .speed_plots import plot_speed
from .steps import SERVING, STEPS, Setting, random_clip
from .timing import measure_runs, ratio


RATIOS = {  # what is divided by what
    "step": "floor",
    "images": "floor",
    "plain": "step",
    "practice": "step",
    "truncated": "step",
    "snapshot": "shared",
    "compiled": "step",
    "classifier": "features",
}
MEMORY = ", memory"  # marks a ratio of memory


def precision() -> str:
    """What a step computes in on this machine."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def origin_of(**settings: Any) -> dict[str, Any]:
    """Where and with what something is measured."""
    return {"machine": machine(), "code": {"versions": versions(), **commit()}, "settings": settings}


def origin_lines(found: dict[str, Any]) -> list[str]:
    """`origin_of` as Markdown."""
    settings = ", ".join(f"{name}: {value}" for name, value in found["settings"].items())
    return [*origin([found]), f"* Settings: {settings}"]


def measure_speed(
    out: Path,
    batches: Sequence[int],
    tasks: Sequence[int] = (1, 4),
    serving_tasks: Sequence[int] = (1, 32),
    classes: int = 65,
    repeats: int = 5,
    compiled: bool = False,
    shape: str = "ViT-B/16",
) -> str:
    """Measure `STEPS` and serving; write `speed.json` after each setting, `speed.md` and `speed.png` at the end.

    Args:
        out (`Path`): folder of these files.
        batches, tasks: each pair is a setting of training.
        serving_tasks: numbers of tasks that a classifier knows, for serving.
        classes, repeats, shape: classes of each task, repetitions, one of `SHAPES`.
        compiled: measure `torch.compile` too.

    Returns:
        The text of `speed.md`.

    Raises:
        ValueError: more tasks than images, or numbers that measure nothing.
    """
    if max(tasks) > min(batches):
        raise ValueError(
            f"{max(tasks)} tasks are more than the {min(batches)} images of a batch, so some would have none; write "
            "larger --batches or fewer --tasks."
        )
    processor = load_processor(small_clip())
    clip = random_clip(shape, processor.tokenizer)
    origin = origin_of(shape=shape, precision=precision(), repeats=repeats, classes=classes)
    found = {**origin, "training": [], "serving": []}
    plan = [("training", *sizes) for sizes in itertools.product(batches, tasks)]
    plan += [("serving", *sizes) for sizes in itertools.product(batches, serving_tasks)]
    out.mkdir(parents=True, exist_ok=True)
    variants = {"training": len(STEPS) - (not compiled), "serving": len(SERVING)}
    bar = tqdm(total=(repeats + 2) * sum(variants[part] for part, *_ in plan), disable=None, unit="run")
    for part, batch, count in plan:
        setting = Setting(clip, processor, batch, count, classes)
        runs = setting.steps(compiled) if part == "training" else setting.serving()
        one = {"batch": batch, "tasks": count, **measure_runs(runs, repeats, bar.update)}
        one["ratios"] = ratios(one)
        found[part].append(one)
        write_json(found, out / "speed.json")
        medians = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in one["median"].items())
        bar.write(f"{part}, batch {batch}, tasks {count}: {medians}")
    bar.close()
    if found["training"]:
        plot_speed(found["training"], f"{shape}, {classes} classes, {found['machine']['device']}", out / "speed.png")
    text = speed_text(found)
    (out / "speed.md").write_text(text)
    return text


def speed_text(found: dict[str, Any]) -> str:
    """What `measure_speed` found, as Markdown."""
    return "\n".join(["# Speed", "", *origin_lines(found), "", *_tables(found), ""])


def ratios(one: dict[str, Any]) -> dict[str, float]:
    """The ratios of one setting's times (see `ratio`), and of its memory."""
    found, peaks = {}, one["peak_bytes"]
    for name, over in RATIOS.items():
        if name in one["seconds"]:
            found[f"{name} / {over}"] = ratio(one["seconds"], name, over)
            if peaks[name] is not None and peaks[over]:
                found[f"{name} / {over}{MEMORY}"] = peaks[name] / peaks[over]
    return found


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table of numbers."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---:|' * len(heads)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def number(value: float | None, factor: float) -> str:
    """A number of a table; nothing where there is none."""
    return "" if value is None else f"{factor * value:.0f}"


def _tables(found: dict[str, Any]) -> list[str]:
    lines = []
    for part, title in (("training", "Training step"), ("serving", "Prediction")):
        if not found[part]:
            continue
        names = list(found[part][0]["seconds"])
        lines += [f"## {title}", "", *(f"* {name}: {SERVING.get(name) or STEPS[name]}" for name in names), ""]
        parts = []
        for memory in (False, True):
            keys = [key for key in found[part][0]["ratios"] if key.endswith(MEMORY) == memory]
            parts.append((keys, [[f"{one['ratios'][key]:.2f}" for key in keys] for one in found[part]]))
        for unit, factor, kind in (("ms", 1e3, "median"), ("MB", 1e-6, "peak_bytes")):
            cells = [[number(value, factor) for value in one[kind].values()] for one in found[part]]
            parts.append(([f"{name}, {unit}" for name in names], cells))
        for heads, cells in parts:
            if not heads:
                continue
            rows = [[one["batch"], one["tasks"], *row] for one, row in zip(found[part], cells)]
            lines += [*table(["batch", "tasks", *heads], rows), ""]
    return lines

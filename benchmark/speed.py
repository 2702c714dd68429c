"""Measuring steps and predictions, compared with the plain image tower and with the common practice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmap_peft.data.pictograms import small_clip
from mmap_peft.multitask.files import write_json
from mmap_peft.multitask.loading import load_processor

from .machine import origin
from .speed_plots import plot_speed
from .steps import SERVING, STEPS, Setting, precision, random_clip
from .tables import cell, head_lines, table_lines
from .timing import measure_runs, ratio


RATIOS = {  # numerators and their denominators, by names of `STEPS` and `SERVING`
    "step": "floor",
    "images": "floor",
    "plain": "step",
    "practice": "step",
    "truncated": "step",
    "snapshot": "shared",
    "compiled": "step",
    "classifier": "features",
}
MEMORY = ", memory"  # suffix of the names of memory ratios


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
    """Measure training steps and predictions of a CLIP with random weights. Writes `speed.json` after each setting,
    and `speed.md` and `speed.png` at the end.

    Args:
        out (`Path`): folder of these files.
        batches, tasks: numbers of images and of tasks; each pair is a setting of training (`STEPS`).
        serving_tasks: numbers of tasks that a classifier knows; each pair with `batches` is a setting of `SERVING`.
        classes (`int`): classes of each task.
        repeats (`int`): how often each time is taken.
        compiled (`bool`): measure `torch.compile` too.
        shape (`str`): one of `SHAPES`.

    Returns:
        The text of `speed.md`.

    Raises:
        ValueError: there are more tasks than images, or `classes` or `repeats` is out of range.
    """
    if max(tasks) > min(batches):
        raise ValueError(
            f"{max(tasks)} tasks are more than the {min(batches)} images of a batch, so some would have none; write "
            "larger --batches or fewer --tasks."
        )
    settings = {"shape": shape, "precision": precision(), "repeats": repeats, "classes": classes}
    measurement = {**origin(), "settings": settings, "training": [], "serving": []}
    plan = [("training", *sizes) for sizes in itertools.product(batches, tasks)]
    plan += [("serving", *sizes) for sizes in itertools.product(batches, serving_tasks)]
    out.mkdir(parents=True, exist_ok=True)
    _measure(measurement, plan, compiled, out / "speed.json")
    return _write_pages(measurement, out)


def _measure(measurement: dict[str, Any], plan: list[tuple[str, int, int]], compiled: bool, path: Path) -> None:
    """Add the settings of `plan` (part, images, tasks) to a measurement, and write it to `path` after each."""
    shape, repeats, classes = (measurement["settings"][name] for name in ("shape", "repeats", "classes"))
    processor = load_processor(small_clip())
    clip = random_clip(shape, processor.tokenizer)
    variants = {"training": len(STEPS) - (not compiled), "serving": len(SERVING)}
    total = (repeats + 2) * sum(variants[part] for part, *_ in plan)
    with tqdm(total=total, disable=None, unit="run") as bar:
        for part, batch, count in plan:
            setting = Setting(clip, processor, batch, count, classes)
            runs = setting.steps(compiled) if part == "training" else setting.serving()
            times = measure_runs(runs, repeats, bar.update)
            measurement[part].append({"batch": batch, "tasks": count, **times, "ratios": ratios(times)})
            write_json(measurement, path)
            medians = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in times["median"].items())
            bar.write(f"{part}, batch {batch}, tasks {count}: {medians}")


def _write_pages(measurement: dict[str, Any], out: Path) -> str:
    if measurement["training"]:
        settings, device = measurement["settings"], measurement["machine"]["device"]
        title = f"{settings['shape']}, {settings['classes']} classes, {device}"
        plot_speed(measurement["training"], title, out / "speed.png")
    text = speed_text(measurement)
    (out / "speed.md").write_text(text)
    return text


def speed_text(measurement: dict[str, Any]) -> str:
    """The text of `speed.md` from the fields of `speed.json`."""
    lines = head_lines("Speed", measurement)
    for part, title in (("training", "Training step"), ("serving", "Prediction")):
        if measurement[part]:
            names = measurement[part][0]["seconds"]
            lines += [f"## {title}", "", *(f"* {name}: {SERVING.get(name) or STEPS[name]}" for name in names), ""]
            lines += _tables(measurement[part])
    return "\n".join([*lines, ""])


def ratios(times: dict[str, Any]) -> dict[str, float]:
    """The `RATIOS` of the times (see `ratio`) and of the memory that `measure_runs` returned."""
    values, peaks = {}, times["peak_bytes"]
    for name, over in RATIOS.items():
        if name in times["seconds"]:
            values[f"{name} / {over}"] = ratio(times["seconds"], name, over)
            if peaks[name] is not None and peaks[over]:
                values[f"{name} / {over}{MEMORY}"] = peaks[name] / peaks[over]
    return values


def _tables(settings: list[dict[str, Any]]) -> list[str]:
    """Tables of ratios of time, ratios of memory, times, and memory; a row for each setting."""
    columns = []
    for memory in (False, True):
        keys = [key for key in settings[0]["ratios"] if key.endswith(MEMORY) == memory]
        columns.append((keys, [[f"{one['ratios'][key]:.2f}" for key in keys] for one in settings]))
    for unit, factor, kind in (("ms", 1e3, "median"), ("MB", 1e-6, "peak_bytes")):
        heads = [f"{name}, {unit}" for name in settings[0]["seconds"]]
        columns.append((heads, [[cell(value, factor) for value in one[kind].values()] for one in settings]))
    lines = []
    for heads, cells in columns:
        if heads:
            rows = [[one["batch"], one["tasks"], *row] for one, row in zip(settings, cells)]
            lines += [*table_lines(["batch", "tasks", *heads], rows), ""]
    return lines

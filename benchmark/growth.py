"""Measuring how a step's time and memory grow with tasks, classes and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmap_peft.data.pictograms import small_clip
from mmap_peft.multitask.files import write_json
from mmap_peft.multitask.loading import load_processor
from mmap_peft.prompts.mmap import MmAPConfig

from .machine import origin
from .speed_plots import floor_of, plot_growth
from .steps import Setting, class_names, precision, random_clip
from .tables import cell, head_lines, table_lines
from .timing import Runs, measure_runs, ratio


def measure_growth(
    out: Path,
    batch: int,
    tasks: Sequence[int] = (1, 8, 32, 128),
    classes: Sequence[int] = (10, 100, 1000, 10_000),
    prompts: Sequence[int] = (4, 8, 16, 32, 64),
    repeats: int = 5,
    shape: str = "ViT-B/16",
) -> str:
    """Measure how time and memory of a step grow, with a CLIP of random weights. Writes `growth.json` after each kind
    of growth, and `growth.md` and `growth.png` at the end.

    Args:
        out (`Path`): folder of these files.
        batch (`int`): images of a step. Where there are more tasks, the step and its floor have an image of each.
        tasks: numbers of tasks, with 10 classes each.
        classes: numbers of classes of a single task.
        prompts: numbers of prompts of the group, and of its single task with 65 classes; a layer gets both.
        repeats (`int`), shape (`str`): how often each time is measured; one of `SHAPES`.

    Returns:
        The text of `growth.md`.

    Raises:
        ValueError: a number of classes or `repeats` is out of range.
    """
    for count in classes:
        class_names(count)  # raises before anything is measured
    plan = {  # tasks, classes and config of a setting, by the value that grows
        "tasks": {value: (value, 10, MmAPConfig()) for value in tasks},
        "classes": {value: (1, value, MmAPConfig()) for value in classes},
        "prompts": {value: (1, 65, MmAPConfig(num_prompts=value)) for value in prompts},
    }
    settings = {"shape": shape, "precision": precision(), "repeats": repeats, "batch": batch}
    measurement: dict[str, Any] = {**origin(), "settings": settings, "growth": {}}
    out.mkdir(parents=True, exist_ok=True)
    _measure(measurement, plan, out / "growth.json")
    device = measurement["machine"]["device"]
    plot_growth(measurement["growth"], f"{shape}, batch {batch}, {device}", out / "growth.png")
    text = growth_text(measurement)
    (out / "growth.md").write_text(text)
    return text


def _measure(measurement: dict[str, Any], plan: dict[str, dict[int, tuple[int, int, MmAPConfig]]], path: Path) -> None:
    """Add each kind of growth in `plan` to a measurement, and write it to `path` after each."""
    shape, repeats, batch = (measurement["settings"][name] for name in ("shape", "repeats", "batch"))
    processor = load_processor(small_clip())
    clip = random_clip(shape, processor.tokenizer)
    with tqdm(total=0, disable=None, unit="run") as bar:
        for what, sizes in plan.items():
            settings = {value: Setting(clip, processor, max(batch, size[0]), *size) for value, size in sizes.items()}
            runs = _runs(settings, what, batch)
            bar.total += (repeats + 2) * len(runs)
            times = measure_runs(runs, repeats, bar.update)
            measurement["growth"][what] = {"values": list(sizes), **times}
            write_json(measurement, path)
            bar.write(f"{what}: {', '.join(f'{name}: {median:.2f} s' for name, median in times['median'].items())}")


def _runs(settings: dict[int, Setting], what: str, batch: int) -> Runs:
    runs = {f"step {value}": setting.step for value, setting in settings.items()}
    if what == "tasks":
        for value, setting in settings.items():
            runs |= {f"shared {value}": setting.shared, f"snapshot {value}": setting.snapshot}
    for value, setting in settings.items():
        images = len(setting.images["labels"])
        runs.setdefault("floor" if images == batch else f"floor {value}", setting.floor)
    return runs


def growth_text(measurement: dict[str, Any]) -> str:
    """The text of `growth.md` from the fields of `growth.json`."""
    lines = head_lines("Growth", measurement)
    for what, panel in measurement["growth"].items():
        kinds = ["step", "shared", "snapshot"] if what == "tasks" else ["step"]
        rows = []
        for value in panel["values"]:
            over_floor = f"{ratio(panel['seconds'], f'step {value}', floor_of(panel, value)):.2f}"
            rows.append([value, over_floor, *_cells(panel, [f"{kind} {value}" for kind in kinds])])
        for name in dict.fromkeys(floor_of(panel, value) for value in panel["values"]):
            rows.append([name, "", *_cells(panel, [name]), *[""] * 2 * (len(kinds) - 1)])
        heads = [what, "step / floor", *(f"{kind}, {unit}" for kind in kinds for unit in ("ms", "MB"))]
        lines += [*table_lines(heads, rows), ""]
    return "\n".join(lines)


def _cells(panel: dict[str, Any], names: list[str]) -> list[str]:
    """Time and memory of each of these runs."""
    pairs = ((panel["median"][name], panel["peak_bytes"][name]) for name in names)
    return [text for seconds, size in pairs for text in (cell(seconds, 1e3), cell(size, 1e-6))]

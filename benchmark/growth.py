"""Measuring how a step's time grows with tasks, classes and prompts."""

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
from .speed_plots import plot_growth
from .steps import Setting, precision, random_clip
from .tables import cell, head_lines, table_lines
from .timing import Runs, measure_runs


def measure_growth(
    out: Path,
    batch: int,
    tasks: Sequence[int] = (1, 2, 4, 8, 16, 32),
    classes: Sequence[int] = (10, 30, 100, 300, 1000),
    prompts: Sequence[int] = (4, 8, 16, 32, 64),
    repeats: int = 5,
    shape: str = "ViT-B/16",
) -> str:
    """Measure how the time of a step grows, with a CLIP of random weights. Writes `growth.json` after each kind of
    growth, and `growth.md` and `growth.png` at the end.

    Args:
        out (`Path`): folder of these files.
        batch (`int`): images of a step; at least as many as the most tasks.
        tasks: numbers of tasks, with 10 classes each.
        classes: numbers of classes of a single task.
        prompts: numbers of prompts of the group, and of its single task with 65 classes; a layer gets both.
        repeats (`int`), shape (`str`): how often each time is measured; one of `SHAPES`.

    Returns:
        The text of `growth.md`.

    Raises:
        ValueError: there are more tasks than images, or a number of classes or `repeats` is out of range.
    """
    if max(tasks) > batch:
        raise ValueError(
            f"{max(tasks)} tasks are more than the {batch} images of a batch, so some would have none; write a larger "
            "--growth-batch or fewer --growth-tasks."
        )
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
    variants = sum(1 + len(sizes) * (3 if what == "tasks" else 1) for what, sizes in plan.items())  # see `_runs`
    with tqdm(total=(repeats + 2) * variants, disable=None, unit="run") as bar:
        for what, sizes in plan.items():
            runs = _runs({value: Setting(clip, processor, batch, *size) for value, size in sizes.items()}, what)
            times = measure_runs(runs, repeats, bar.update)
            measurement["growth"][what] = {"values": list(sizes), **times}
            write_json(measurement, path)
            bar.write(f"{what}: {', '.join(f'{name}: {median:.2f} s' for name, median in times['median'].items())}")


def _runs(settings: dict[int, Setting], what: str) -> Runs:
    runs = {f"step {value}": setting.step for value, setting in settings.items()}
    if what == "tasks":
        for value, setting in settings.items():
            runs |= {f"shared {value}": setting.shared, f"snapshot {value}": setting.snapshot}
    return {**runs, "floor": next(iter(settings.values())).floor}


def growth_text(measurement: dict[str, Any]) -> str:
    """The text of `growth.md` from the fields of `growth.json`."""
    lines = head_lines("Growth", measurement)
    for what, panel in measurement["growth"].items():
        kinds = ["step", "shared", "snapshot"] if what == "tasks" else ["step"]
        rows = [[value, *_cells(panel, [f"{kind} {value}" for kind in kinds])] for value in panel["values"]]
        rows.append(["floor", *_cells(panel, ["floor"]), *[""] * 2 * (len(kinds) - 1)])
        heads = [what, *(f"{kind}, {unit}" for kind in kinds for unit in ("ms", "MB"))]
        lines += [*table_lines(heads, rows), ""]
    return "\n".join(lines)


def _cells(panel: dict[str, Any], names: list[str]) -> list[str]:
    """Time and memory of each of these runs."""
    pairs = ((panel["median"][name], panel["peak_bytes"][name]) for name in names)
    return [text for seconds, size in pairs for text in (cell(seconds, 1e3), cell(size, 1e-6))]

"""How a step's time grows with tasks, classes and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmap_peft.data.pictograms import small_clip
from mmap_peft.multitask.files import write_json
from mmap_peft.multitask.saving import load_processor

from .speed import number, origin_lines, origin_of, precision, table
from .speed_plots import plot_growth
from .steps import Setting, random_clip
from .timing import measure_runs


def measure_growth(
    out: Path,
    batch: int,
    tasks: Sequence[int] = (1, 2, 4, 8, 16, 32),
    classes: Sequence[int] = (10, 30, 100, 300, 1000),
    prompts: Sequence[int] = (4, 8, 16, 32, 64),
    repeats: int = 5,
    shape: str = "ViT-B/16",
) -> str:
    """Measure steps of one kind of growth after the other; write `growth.json` after each, `growth.md` and
    `growth.png` at the end.

    Args:
        out (`Path`): folder of these files.
        batch (`int`): images of a step, as many as the most tasks or more.
        tasks: numbers of tasks, with 10 classes each.
        classes: numbers of classes, of one task.
        prompts: numbers of prompts of the group and of its one task each, so that a layer gets twice as many; 65
            classes.
        repeats, shape: repetitions; one of `SHAPES`.

    Returns:
        The text of `growth.md`.

    Raises:
        ValueError: more tasks than images, or numbers that measure nothing.
    """
    if max(tasks) > batch:
        raise ValueError(
            f"{max(tasks)} tasks are more than the {batch} images of a batch, so some would have none; write a larger "
            "--growth-batch or fewer --growth-tasks."
        )
    processor = load_processor(small_clip())
    clip = random_clip(shape, processor.tokenizer)
    plan = {
        "tasks": {value: (value, 10, None) for value in tasks},
        "classes": {value: (1, value, None) for value in classes},
        "prompts": {value: (1, 65, value) for value in prompts},
    }
    origin = origin_of(shape=shape, precision=precision(), repeats=repeats, batch=batch)
    found: dict[str, Any] = {**origin, "growth": {}}
    out.mkdir(parents=True, exist_ok=True)
    count = 3 + 3 * len(tasks) + len(classes) + len(prompts)
    bar = tqdm(total=(repeats + 2) * count, disable=None, unit="run")
    for what, sizes in plan.items():
        settings = {value: Setting(clip, processor, batch, *given) for value, given in sizes.items()}
        runs = {f"step {value}": setting.step for value, setting in settings.items()}
        if what == "tasks":
            for value, setting in settings.items():
                runs |= {f"shared {value}": setting.shared, f"snapshot {value}": setting.snapshot}
        runs["floor"] = next(iter(settings.values())).floor
        found["growth"][what] = {"values": list(sizes), **measure_runs(runs, repeats, bar.update)}
        write_json(found, out / "growth.json")
        medians = ", ".join(f"{name}: {seconds:.2f} s" for name, seconds in found["growth"][what]["median"].items())
        bar.write(f"{what}: {medians}")
    bar.close()
    plot_growth(found["growth"], f"{shape}, batch {batch}, {found['machine']['device']}", out / "growth.png")
    text = growth_text(found)
    (out / "growth.md").write_text(text)
    return text


def growth_text(found: dict[str, Any]) -> str:
    """What `measure_growth` found, as Markdown."""
    return "\n".join(["# Growth", "", *origin_lines(found), "", *_tables(found["growth"])])


def _tables(panels: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for what, panel in panels.items():
        kinds = ["step", "shared", "snapshot"] if what == "tasks" else ["step"]
        rows = []
        for value in panel["values"]:
            cells = [value]
            for kind in kinds:
                name = f"{kind} {value}"
                cells += [number(panel["median"][name], 1e3), number(panel["peak_bytes"][name], 1e-6)]
            rows.append(cells)
        rows.append(["floor", number(panel["median"]["floor"], 1e3), number(panel["peak_bytes"]["floor"], 1e-6)])
        rows[-1] += [""] * (len(rows[0]) - len(rows[-1]))
        heads = [what, *(f"{kind}, {unit}" for kind in kinds for unit in ("ms", "MB"))]
        lines += [*table(heads, rows), ""]
    return lines

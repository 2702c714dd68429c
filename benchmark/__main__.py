"""Compare methods on data sets, and measure speed and memory.

    python -m benchmark tune benchmark/studies/pictograms.yaml
    python -m benchmark run benchmark/studies/pictograms.yaml --workers 2
    python -m benchmark report benchmark/studies/pictograms.yaml
    python -m benchmark compare benchmark/studies/pictograms.yaml mmap mmap_alone
    python -m benchmark speed --out speed --growth
    python -m benchmark loading --out loading
    python -m benchmark clustering --out clustering

`tune` chooses settings from the grids of the experiments, by accuracy on a part of the training images. `run` trains
and evaluates each run of the study that has no result yet. `report` writes tables and plots of the results. `compare`
prints the difference of two experiments, and the test images that only one of them gets right. `speed` measures time
and memory of a training step and of a prediction; `loading` measures how fast images are read; `clustering` how good
and how fast groups of tasks are found.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from mmap_peft.multitask.processes import cores

from .cached import measure_cached
from .clustering import measure_clustering
from .compare import compare_experiments
from .growth import measure_growth
from .loading import measure_loading
from .report import write_report
from .results_file import Results
from .runner import Runner
from .speed import measure_speed
from .steps import SHAPES
from .study import Study
from .tune import apply_choices, choose, table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_study_commands(commands)
    _add_speed(commands.add_parser("speed", formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    _add_loading(commands.add_parser("loading", formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    _add_clustering(commands.add_parser("clustering", formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stops the runs too
    try:
        if options.command in MEASUREMENTS:
            print(MEASUREMENTS[options.command](options))
            return 0
        study = Study.read(options.study)
        results = Results((options.results or options.study.resolve().parents[1] / "results") / study.name)
        runner = Runner(results, options.workers)
        if options.command != "report":
            study.prepare()
        if options.command == "tune":
            return _tune(study, results, runner)
        study, untuned = apply_choices(study, results)
        if options.command in ("report", "compare"):
            print(_page(options, study, results, untuned))
            return 0
        if untuned:
            print(f"`tune` has chosen nothing for {', '.join(untuned)}; the values in their files are used.")
        return _end(runner(study.planted_runs("groups") + study.planted_runs("new_tasks") + study.runs()))
    except (ValueError, ConnectionError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = "" if options.command in MEASUREMENTS else ", and the same command goes on from there"
        print(f"Interrupted; all results so far are kept{resumes}.", file=sys.stderr)
        return 130


def _add_study_commands(commands: Any) -> None:
    for name in ("tune", "run", "report", "compare"):
        command = commands.add_parser(name)
        command.add_argument("study", type=Path, help="YAML file of the study")
        if name == "compare":
            command.add_argument("experiments", nargs=2, help="names of two experiments")
            command.add_argument("--most", type=int, default=20, help="number of images to list [20]")
        command.add_argument("--workers", type=int, default=1, help="number of runs at the same time [1]")
        command.add_argument("--results", type=Path, help="folder of results [../results, as seen from the study]")


def _page(options: argparse.Namespace, study: Study, results: Results, untuned: list[str]) -> str:
    if options.command == "report":
        return write_report(study, results, untuned)
    return compare_experiments(study, results, options.experiments, options.most)


def _add_speed(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--out", type=Path, default=Path("speed"), help="folder for the results")
    add("--batches", type=int, nargs="*", default=[64, 256] if gpu else [4, 16], help="images of a step; may be empty")
    add("--tasks", type=int, nargs="+", default=[1, 4], help="numbers of tasks in a training step")
    add("--serving-tasks", type=int, nargs="+", default=[1, 32], help="numbers of tasks of a serving classifier")
    add("--classes", type=int, default=65, help="classes of each task")
    add("--repeats", type=int, default=20 if gpu else 5, help="how often each time is taken")
    add("--compile", action="store_true", help="also measure torch.compile")
    add("--cached", action="store_true", help="instead, measure steps whose image features are kept (cache_features)")
    add("--growth", action="store_true", help="also measure how time and memory of a step grow")
    add(
        "--growth-batch",
        type=int,
        default=256 if gpu else 32,
        help="images of a step, or one a task if these are more",
    )
    add("--growth-tasks", type=int, nargs="+", default=[1, 8, 32, 128], help="numbers of tasks, of 10 classes")
    add("--growth-classes", type=int, nargs="+", default=[10, 100, 1000, 10_000], help="numbers of classes")
    add("--growth-prompts", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="prompts of group and task each")
    add("--shape", choices=list(SHAPES), default="ViT-B/16", help=argparse.SUPPRESS)  # tests use a tiny one


def _add_loading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("loading"), help="folder for the results")
    add("--workers", type=int, nargs="+", default=[0, cores()], help="numbers of worker processes")
    add("--images", type=int, default=1000, help="number of JPEG files to make and read")
    add("--side", type=int, default=400, help="height and width of each in pixels")
    add("--epochs", type=int, default=3, help="passes over all files")


def _add_clustering(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("clustering"), help="folder for the results")
    parser.add_argument(
        "--tasks", type=int, nargs="+", default=[10, 20, 30, 100, 200, 300, 1000], help="numbers of tasks"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="time limit of each clustering")


def _speed(options: argparse.Namespace) -> str:
    texts = []
    if options.batches and options.cached:
        sizes = (options.batches, options.tasks, options.classes)
        texts.append(measure_cached(options.out, *sizes, options.repeats, options.shape))
    elif options.batches:
        sizes = (options.batches, options.tasks, options.serving_tasks, options.classes)
        texts.append(measure_speed(options.out, *sizes, options.repeats, options.compile, options.shape))
    if options.growth:
        sizes = (options.growth_batch, options.growth_tasks, options.growth_classes, options.growth_prompts)
        texts.append(measure_growth(options.out, *sizes, options.repeats, options.shape))
    return "\n".join(texts)


def _loading(options: argparse.Namespace) -> str:
    return measure_loading(options.out, options.workers, options.images, options.side, options.epochs)


def _clustering(options: argparse.Namespace) -> str:
    return measure_clustering(options.out, options.tasks, options.seconds)


MEASUREMENTS = {"speed": _speed, "loading": _loading, "clustering": _clustering}


def _tune(study: Study, results: Results, runner: Runner) -> int:
    runs = [
        run
        for experiment in study.experiments
        if experiment.grid
        for point in study.validation_runs(experiment)
        for run in point
    ]
    failed = runner(runs)
    print(table(choose(study, results)))
    return _end(failed)


def _end(failed: int) -> int:
    if failed:
        print(f"{failed} runs failed; the same command tries them again.", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

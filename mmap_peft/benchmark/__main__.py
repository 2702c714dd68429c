"""Compare methods.

    python -m mmap_peft.benchmark tune benchmark/studies/pictograms.yaml
    python -m mmap_peft.benchmark run benchmark/studies/pictograms.yaml --workers 2
    python -m mmap_peft.benchmark report benchmark/studies/pictograms.yaml

`tune` chooses from the experiments' grids, on training images alone; `run` runs what has no result yet; `report` makes
tables and plots of the results that are there.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from .report import write_report
from .runner import Results, Runner
from .study import Study
from .tune import apply_choices, choose, table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mmap_peft.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["run", "tune", "report"])
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time [1]")
    parser.add_argument("--results", type=Path, help="folder of results [../results, as seen from the study]")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no run goes on alone
    try:
        study = Study.read(options.study)
        results = Results((options.results or options.study.resolve().parents[1] / "results") / study.name)
        runner = Runner(results, options.workers)
        if options.command == "tune":
            return _tune(study, results, runner)
        study, open_ = apply_choices(study, results)
        if options.command == "report":
            print(write_report(study, results, open_))
            return 0
        if open_:
            print(f"Nothing was chosen by `tune` for {', '.join(open_)}; their files' own values are taken.")
        return _end(runner(study.runs()))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; all results so far are kept, and the same command goes on.", file=sys.stderr)
        return 130


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

"""Runs `train_tiny` in forked processes, so that its modules are imported once: `fork_tiny.py LAUNCHES`.

LAUNCHES is a JSON file with a list of launches, one after the other. A launch has `arguments`, those of
`train_tiny.main`, and `environments`, one for each of its processes.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from tests.multitask.train_tiny import main


def run(arguments: list, environment: dict[str, str], log: Path) -> None:
    """Train in this process, and end it."""
    descriptor, code = os.open(log, os.O_WRONLY | os.O_CREAT), 1
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    try:
        clip, output, accumulation = arguments
        main(clip, Path(output), accumulation)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for launch in json.loads(Path(sys.argv[1]).read_text()):
        processes = []
        for number, environment in enumerate(launch["environments"]):
            process = os.fork()
            if not process:
                run(launch["arguments"], environment, Path(launch["arguments"][1], f"log_{number}"))
            processes.append(process)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        if any(codes):
            sys.exit(f"{launch['arguments'][1]}: exit codes {codes}")

"""The command `mmap-peft`.

It is no part of the package, since importing that takes seconds: `--help` and `--version` are answered without it.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path


COMMANDS = ("train", "predict", "evaluate", "report", "app", "info", "export", "card", "push")
PACKAGE = "mmap_peft"
PLAIN = (ValueError, OSError, ImportError, NotImplementedError)  # their messages say enough


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments. `None`: those of the process.

    Returns:
        The exit code: 0, or 2 after an error, which is one sentence on stderr. `predict` documents 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    name, *rest = [each for each in argv if each != "--debug"] or ["--help"]
    if name in ("-h", "--help", "--version"):
        print(_version() if name == "--version" else _help())
        return 0
    try:
        return _run(name, rest)
    except SystemExit as end:  # argparse ends so after --help
        return end.code or 0
    except KeyboardInterrupt:
        print(f"mmap-peft {name}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"mmap-peft {name if name in COMMANDS else ''}".strip() + f": {sentence(error)}", file=sys.stderr)
        return 2


def _run(name: str, argv: Sequence[str]) -> int:
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"write one of {', '.join(COMMANDS)}."
        raise ValueError(f"{name!r} is no command; {hint}")
    with warnings.catch_warnings():
        if not sys.warnoptions:  # they are for those who write Python
            warnings.simplefilter("ignore", FutureWarning)
        return import_module(f"{PACKAGE}.commands.{name}").main(argv) or 0


def sentence(error: Exception) -> str:
    """An error on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    text = " ".join(str(error).split())
    return text if isinstance(error, PLAIN) and text else f"{type(error).__name__}: {text} (--debug shows where.)"


def _folder() -> Path:
    return Path(importlib.util.find_spec(PACKAGE).origin).parent  # does not import the package


def _version() -> str:
    return f"{PACKAGE} {runpy.run_path(str(_folder() / 'version.py'))['__version__']}"


def _help() -> str:
    """The commands, with the first sentence of each one's file."""
    lines = []
    for name in COMMANDS:
        text = ast.get_docstring(ast.parse((_folder() / "commands" / f"{name}.py").read_text("utf-8")))
        lines.append(f"  {name:<10}{text.splitlines()[0]}")
    return "\n".join(
        [
            "usage: mmap-peft COMMAND [arguments] [--debug]",
            "",
            "One frozen CLIP, many image classification tasks, and a few thousand trained parameters for each.",
            "",
            *lines,
            "",
            "mmap-peft COMMAND --help  shows a command's arguments; --debug shows where an error comes from.",
            "mmap-peft --version       shows the version.",
            "mmap-peft train --demo    tries it on pictures that ship with the package.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

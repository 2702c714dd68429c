"""Read suites from YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmap_peft.data.suites import Suite, SuiteTask

from .reading import build, check_mapping, check_name, read_yaml


SUITES = Path(__file__).parent / "suites"


def read_suite(given: Any) -> Suite:
    """Read a suite, given by the name of a file in `benchmark/suites` or by a path that ends in `.yaml`.

    The file has `tasks`, the fields of [`SuiteTask`] by name, and may have `extends`, another suite whose tasks come
    first.

    Raises:
        ValueError: there is no such file, it has other fields, or a task is defined twice.
    """
    path = _path(given)
    return Suite(path.stem, _read_tasks(path, ()))


def _path(given: Any, folder: Path = Path()) -> Path:
    if isinstance(given, str) and given.endswith(".yaml"):
        return folder / given
    check_name(given, "Suite")
    path = SUITES / f"{given}.yaml"
    if not path.exists():
        known = sorted(file.stem for file in SUITES.glob("*.yaml") if file.stem != "references")
        raise ValueError(
            f"There is no suite {given!r}; write one of {', '.join(known)}, or a path that ends in .yaml."
        )
    return path


def _read_tasks(path: Path, before: tuple[Path, ...]) -> list[SuiteTask]:
    """The tasks of a file and of those that it extends; `before` are the files that led to it."""
    path = path.resolve()
    if path in before:
        raise ValueError(f"Suite {path} extends itself; leave extends out in one of the files.")
    values = read_yaml(path)
    if set(values) - {"extends", "tasks"} or "tasks" not in values:
        raise ValueError(f"Suite {path} has the fields {', '.join(values)}; write tasks, and extends if it needs it.")
    check_mapping(values["tasks"], f"tasks in {path}")
    tasks = _read_tasks(_path(values["extends"], path.parent), (*before, path)) if "extends" in values else []
    for name, fields in values["tasks"].items():
        check_mapping(fields, f"Task {name!r} in {path}")
        if name in [task.name for task in tasks]:
            raise ValueError(f"Task {name!r} in {path} is in the suite that it extends as well; leave it out in one.")
        tasks.append(build(SuiteTask, {"name": name, **fields}, f"task {name!r} in {path}"))
    return tasks

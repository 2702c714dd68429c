"""Read YAML files into dataclasses, with errors that say what to write instead."""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml


T = TypeVar("T")


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Read the fields of a YAML file.

    Raises:
        ValueError: the file cannot be read, is not YAML, or holds something other than fields.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({error}); write fields such as `name: value`.") from error
    check_mapping(values, f"What {path} holds")
    _check_numbers(values, path)
    return values


def build(cls: type[T], values: dict[str, Any], source: str | os.PathLike) -> T:
    """Make a dataclass from the fields of a file.

    Args:
        cls: the dataclass.
        values: its fields.
        source: the file, for errors.

    Raises:
        ValueError: a field is unknown or missing.
    """
    known = {field.name: field for field in fields(cls)}
    wrong = sorted(set(values) - set(known))
    if wrong:
        raise ValueError(f"{source} has {', '.join(wrong)}, which is no field; the fields are {', '.join(known)}.")
    missing = [name for name, field in known.items() if name not in values and _required(field)]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}; write a line for each.")
    return cls(**values)


def check_name(name: Any, kind: str) -> None:
    """Raise a `ValueError` if `name` cannot be part of a file's name."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
        raise ValueError(f"{kind} {name!r} is to name files; write letters, digits, '_' and '-' only.")


def check_mapping(value: Any, what: str) -> None:
    """Raise a `ValueError` if `value` is not a dict whose keys are texts."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} is {value!r}; write fields such as `name: value` below it.")


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _check_numbers(value: Any, path: str | os.PathLike) -> None:
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_numbers(part, path)
    elif isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, flags=re.IGNORECASE):
        raise ValueError(
            f"{path} holds {value}, which is a text in YAML; write {float(value)!r}, or {value!r} as 1.0e-3."
        )

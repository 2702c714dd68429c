"""Checks values by type and range, with the setting's name in the error."""

from __future__ import annotations

import functools
import re
import reprlib
import types
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le
from pydantic import AfterValidator, ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from .patterns import check_pattern


LONGEST = 450  # characters of a reason
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60

_WORDS = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string", type(None): "None"}
_PYDANTIC = {
    "integer": "an integer",
    "boolean": "True or False",
    **{word: f"a {word}" for word in ("number", "string", "list", "tuple", "set", "dictionary", "finite number")},
    **{word: f"a number {word}" for word in ("greater", "less")},
}


# Kinds of settings. A string among the constraints of a kind says in words what is expected.
Count = Annotated[int, Ge(1), Le(2**31), "an integer of 1 or more"]
Amount = Annotated[float, Ge(0)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Pattern = Annotated[str, AfterValidator(check_pattern), "a regular expression"]
Names = list[str] | tuple[str, ...] | set[str]


def shortened(value: Any) -> str:
    """A value's `repr`, on one line of at most 100 characters."""
    try:
        text = " ".join(_short.repr(value).split())
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = f"a {type(value).__name__} of a number with more than 4300 digits"
    return text if len(text) <= 100 else f"{text[:65]}...{text[-32:]}"


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    except PydanticUserError:  # a TypedDict or dataclass has a config of its own
        return TypeAdapter(kind)


def checked(value: Any, kind: Any, name: str, instead: str = "") -> Any:
    """Return a value if it is of a kind, or raise a `ValueError` that names the setting.

    Args:
        value: the value. It is not converted: `True` and `1.0` are no integers, but an integer is a `float`. NaN and
            infinity are no numbers.
        kind: a type annotation, with pydantic's constraints if it has any: `Annotated[int, Ge(1)] | None`.
        name (`str`): name of the setting.
        instead (`str`): what to write instead, if the words for `kind` are too technical.
    """
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        places = [_place(value, each) for each in error.errors(include_url=False)]
        place, given, message = max(places, key=lambda each: len(each[0]))  # that of the kind which fits best
        expected = "" if place else _words(kind)
        if message.startswith("Value error, "):
            expected = message.removeprefix("Value error, ")
        elif expected:
            expected = f"expected {expected}"
        else:
            expected = _plain(message)
        reason = instead or expected[:LONGEST]
        raise ValueError(f"Invalid value {shortened(given)} for `{name}{place}`: {reason}.") from None


def check_fields(owner: type, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if a value for a field of a dataclass is not of the kind that the field's annotation says.

    Args:
        owner (`type`): the dataclass. The default of a field is always right.
        values (`Mapping[str, Any]`): values by the names of fields, such as `vars(object)`.
        kinds (`Mapping[str, Any]`): other kinds than those of the annotations, by the names of fields.
    """
    for field, hint in _hints(owner):
        if field.name in values and values[field.name] is not field.default:
            checked(values[field.name], kinds.get(field.name, hint), field.name)


@functools.cache
def _hints(owner: type) -> list[tuple[Field, Any]]:
    hints = get_type_hints(owner, include_extras=True)
    return [(field, hints[field.name]) for field in fields(owner)]


def _place(value: Any, error: Mapping[str, Any]) -> tuple[str, Any, str]:
    """Where in a value an error is, such as `['route'][0]`, what is there, and pydantic's message."""
    place = ""
    for part in error["loc"]:
        # All other parts are pydantic's names for the members of a union.
        if isinstance(value, Mapping) and (part in value or error["type"] == "missing"):
            place, value = f"{place}[{shortened(part)}]", value.get(part)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            place, value = f"{place}[{part}]", value[part]
    return place, error["input"] if place else value, error["msg"]


def _words(kind: Any) -> str:
    """What a kind expects, in words; empty if there are none for it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = {
            key: getattr(note, key) for note in args[1:] for key in ("ge", "gt", "le", "lt") if hasattr(note, key)
        }
        words = _words(args[0])
        return next((note for note in args[1:] if isinstance(note, str)), words and words + _range(**limits))
    if origin in (Union, types.UnionType):
        parts = list(dict.fromkeys(map(_words, args)))
        return f"{', '.join(parts[:-1])}, or {parts[-1]}" if all(parts) else ""
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (list, tuple, set):
        inside = ", ".join(dict.fromkeys(_words(arg) for arg in args if arg is not ...))
        return f"a {origin.__name__}" + (f" with {inside} in each place" if inside else "")
    return _WORDS.get(kind, f"a {kind.__name__}" if isinstance(kind, type) else "")


def _range(ge: Any = None, gt: Any = None, le: Any = None, lt: Any = None) -> str:
    if ge is not None and le is not None:
        return f" from {ge} to {le}"
    below = f" below {lt}" if lt is not None else f" of at most {le}" if le is not None else ""
    if ge is not None:
        return f" of {ge} or more" + (f" and{below}" if below else "")
    return (f" above {gt}" if gt is not None else "") + (f"{' and' * (gt is not None)}{below}" if below else "")


def _plain(message: str) -> str:
    """A message of pydantic in the words of the others."""
    message = re.sub(r"^Input should be (a valid )?", "expected ", message)
    for theirs, ours in _PYDANTIC.items():
        message = message.replace(f"expected {theirs}", f"expected {ours}")
    return f"{message[:1].lower()}{message[1:]}"

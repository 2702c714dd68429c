"""Checks values by type and range, with the setting's name in the error."""

from __future__ import annotations

import functools
import reprlib
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a TypedDict, which has a config of its own
        return TypeAdapter(kind)


def checked(value: Any, kind: Any, name: str, instead: str = "") -> Any:
    """Return a value if it is of a kind, or raise a `ValueError` that names the setting.

    Args:
        value: the value. It is not converted: `True` and `1.0` are no integers, but an integer is a `float`.
        kind: a type annotation, with pydantic's constraints if it has any: `Annotated[int, Ge(1)] | None`.
        name (`str`): name of the setting.
        instead (`str`): what to write instead, if pydantic's words are too technical.
    """
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(
            f"[{part!r}]" for part in first["loc"] if not str(part).startswith(("function", "constrained"))
        )
        given = _short.repr(value)
        reason = instead or f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        raise ValueError(f"Invalid value {given} for `{name}{place}`: {reason}.") from None

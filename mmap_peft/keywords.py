"""Refuse keywords that nothing would read."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any


def check_keywords(*receivers: Callable, without: Collection[str] = ()) -> Callable[[Callable], Callable]:
    """A decorator: a call with a keyword that neither the function nor a receiver knows raises a `TypeError`.

    Args:
        receivers (`Callable`): what the function hands its `**kwargs` on to.
        without (`Collection[str]`): keywords of the receivers that the function sets itself.
    """

    def decorate(function: Callable) -> Callable:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = [p for known in (function, *receivers) for p in inspect.signature(known).parameters.values()]
        names = sorted({p.name for p in parameters if p.kind in kinds} - {"cls", "self", *without})

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for keyword in kwargs.keys() - names:
                close = difflib.get_close_matches(keyword, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(names)}."
                raise TypeError(f"{function.__qualname__}() got an unknown keyword {keyword!r}; {hint}")
            return function(*args, **kwargs)

        return checked

    return decorate

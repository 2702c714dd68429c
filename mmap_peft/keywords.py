"""An error for unknown keyword arguments."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any


def check_keywords(*receivers: Callable, without: Collection[str] = ()) -> Callable[[Callable], Callable]:
    """Decorator of a function that raises a `TypeError` for keyword arguments which neither it nor a receiver has.

    Args:
        receivers (`Callable`): the functions that get the `**kwargs` of the decorated function.
        without (`Collection[str]`): arguments of the receivers that the decorated function sets itself.
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

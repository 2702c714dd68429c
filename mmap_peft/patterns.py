"""Regular expressions that cannot run for ever."""

from __future__ import annotations

import math
import re
from typing import Any


try:
    from re import _constants as constants
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as constants
    import sre_parse as parser

LONGEST = 2000  # characters
NAME = 64  # characters of the name of a module
MOST_WAYS = 10**8
_REPEATS = [getattr(constants, f"{kind}_REPEAT", None) for kind in ("MAX", "MIN", "POSSESSIVE")]
_SINGLE = (constants.LITERAL, constants.NOT_LITERAL, constants.ANY, constants.IN)


def check_pattern(pattern: str) -> str:
    r"""Return a regular expression, or raise a `ValueError` if it is none or could take very long.

    What is repeated more than once must be a single character, as in `.*` or `\d+`: a repeated group can fail to match
    in so many ways that they take hours.
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern)} characters, more than {LONGEST}")
    try:
        ways = _ways(parser.parse(pattern))
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression ({error})") from None
    if ways > MOST_WAYS:
        raise ValueError(
            "matching it could take very long; repeat a few single characters only, as in '.*' or '\\d+', no groups"
        )
    return pattern


def _ways(items: Any) -> float:
    """In how many ways a parsed pattern can match a name, about and at most."""
    ways = 1.0
    for kind, argument in items:
        if kind in _REPEATS:
            least, most, body = argument
            single = len(body) == 1 and body[0][0] in _SINGLE
            ways *= min(most - least + 1, NAME) if single else 1 + _ways(body) if most == 1 else math.inf
        elif kind is constants.BRANCH:
            ways *= sum(map(_ways, argument[1]))
        elif kind is constants.SUBPATTERN:
            ways *= _ways(argument[-1])
        elif kind in (constants.ASSERT, constants.ASSERT_NOT):
            ways *= 1 + _ways(argument[1])
        elif kind not in (*_SINGLE, constants.AT):
            ways = math.inf  # references and the like, which no name of a module needs
    return ways

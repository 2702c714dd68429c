"""Names of classes in plain words, and the templates that their texts are made from."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import AfterValidator

from ..checking import shortened


def whole(text: str) -> str:
    """The text, or a `ValueError` if it cannot be written."""
    if any(unicodedata.category(each) == "Cs" for each in text):
        raise ValueError("it holds half of a character")
    return text


Text = Annotated[str, AfterValidator(whole)]
Texts = Text | Annotated[list[Text], MinLen(1)] | Annotated[tuple[Text, ...], MinLen(1)]


def as_tuple(texts: str | Sequence[str]) -> tuple[str, ...]:
    """One text or several, as a tuple."""
    return (texts,) if isinstance(texts, str) else tuple(texts)


def as_list(names: Any) -> Any:
    """Names in a sequence of any kind, such as an array, as a list; anything else, such as a string, as it is."""
    if isinstance(names, str | bytes | Mapping | Set):
        return names
    if hasattr(names, "tolist"):
        return names.tolist()
    return list(names) if isinstance(names, Iterable) else names


def clean_name(name: str) -> str:
    """A class name in plain words: `"Alarm_Clock"` becomes `"alarm clock"`.

    Unicode characters are composed (NFC), and invisible ones, which join letters or change their direction, left out.
    """
    visible = "".join(each for each in name if unicodedata.category(each) != "Cf")
    return unicodedata.normalize("NFC", re.sub(r"[\s_\-]+", " ", visible).strip().lower())


def clean_names(raw: Sequence[str], source: str) -> list[str]:
    """Class names in plain words, or a `ValueError` that begins with `source` if some of them are the same or empty
    then."""
    names = [clean_name(name) for name in raw]
    counts = Counter(names)
    clash = [raw_name for raw_name, name in zip(raw, names) if counts[name] > 1 or not _is_visible(name)]
    if clash:
        shown = ", ".join(map(shortened, clash[:3])) + (f" and {len(clash) - 3} more" if len(clash) > 3 else "")
        raise ValueError(f"{source} are the same or empty after cleaning: {shown}; rename them.")
    return names


def check_template(template: str, of: str = "") -> None:
    """Raise a `ValueError` if a template has no single place for the class name; `of` names what it belongs to."""
    if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
        raise ValueError(
            f"Template {shortened(template)}{of} must hold {{}} once, for the class name, and no other braces."
        )


def _is_visible(name: str) -> bool:
    return any(each.isprintable() and not each.isspace() for each in name)

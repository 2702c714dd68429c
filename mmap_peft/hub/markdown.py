"""Text of names and numbers that Markdown and HTML show as they are."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from markupsafe import Markup
from peft import PeftConfig

from ..tuner.model import ENCODER_LAYERS


class MarkdownText(str):
    """Text that a template with autoescape writes on one line, so that Markdown shows it as it is, in a table too."""

    def __html__(self) -> str:
        text = re.sub(r"([\\`*\[\]<>~|&$]|\b_|_\b)", r"\\\1", one_line(self))
        # No backslash keeps GitHub's Markdown from making links of addresses; a comment does, and is not seen.
        return re.sub(r"(://|(?<=www)\.|@)", r"<!-- -->\1", text, flags=re.IGNORECASE)


def settings(config: PeftConfig, chosen: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """The settings of a method, without those of every `PeftConfig` and those that are unset or off. Those that were
    `chosen` later take the place of the config's."""
    names = {setting.name for setting in fields(config)} - {setting.name for setting in fields(PeftConfig)}
    values = {name: getattr(config, name) for name in sorted(names)} | dict(chosen or {})
    unset = (None, False, ENCODER_LAYERS, [], {}, "", "none")
    return [(name, str(value)) for name, value in values.items() if value not in unset and not is_dataclass(value)]


def link(repo_id: str | None, text: str, kind: str = "") -> str:
    """The text, as a link to a repository on the Hub if it is one."""
    shown = Markup.escape(MarkdownText(text))
    return Markup(f"[{shown}](https://huggingface.co/{kind}{repo_id})") if repo_id else shown


def literal(text: str) -> Markup:
    """The text as a string of Python."""
    return Markup(json.dumps(text, ensure_ascii=any(unicodedata.category(each) == "Cf" for each in text)))


def one_line(text: str) -> str:
    """The text on one line, without invisible characters, which can change the direction of what follows."""
    return " ".join("".join(each for each in text if unicodedata.category(each) != "Cf").split())


def escaped(value: Any) -> Any:
    """Make all text that is not marked as Markup a `MarkdownText`, in lists and dictionaries as well."""
    if isinstance(value, str):
        return value if isinstance(value, Markup) else MarkdownText(value)
    if isinstance(value, dict):
        return {escaped(key): escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, (list, tuple)) else value

"""Names of classes in plain words."""

from __future__ import annotations

import re
import unicodedata


def clean_name(name: str) -> str:
    """A class name in plain words: `"Alarm_Clock"` becomes `"alarm clock"`.

    Unicode characters are composed (NFC), and invisible ones, which join letters or change their direction, left out.
    """
    visible = "".join(each for each in name if unicodedata.category(each) != "Cf")
    return unicodedata.normalize("NFC", re.sub(r"[\s_\-]+", " ", visible).strip().lower())

"""Writing files so that a crash does not damage them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(fields: dict[str, Any], path: str | os.PathLike) -> None:
    """Write fields to a JSON file, by a temporary file that then replaces it."""
    temporary = Path(f"{path}.part")
    temporary.write_text(json.dumps(fields, indent=1))
    temporary.replace(path)

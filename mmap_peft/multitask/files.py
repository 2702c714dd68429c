"""Writing files so that a crash loses nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(fields: dict[str, Any], path: str | os.PathLike) -> None:
    """Write fields to a JSON file: beside it first, then in its place."""
    beside = Path(f"{path}.part")
    beside.write_text(json.dumps(fields, indent=1))
    beside.replace(path)

"""Results of a sweep that may be stopped: a JSON file with a row a line, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convselect.files import replaced

Row = dict[str, Any]


def read(path: Path) -> dict[str, Row]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, rows: dict[str, Row]) -> None:
    """In order of name; the file is replaced at once, so that a stopped sweep leaves a whole one."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
    with replaced(path) as new:
        new.write_text(f"{{\n{lines}\n}}\n")

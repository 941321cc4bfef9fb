"""Reads files of one JSON object a line, whose writer may have died, or met a full disk, in the middle of a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The object of each line in order; None for a line that is not one, because it is cut or damaged."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                content = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                content = None
            yield content if isinstance(content, dict) else None


def drop_torn_end(path: Path) -> None:
    """Cut off a last line without its end, so that the next one begins on a line of its own. Raises OSError."""
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)

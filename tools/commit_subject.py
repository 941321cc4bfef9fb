"""Rejects a commit whose subject is longer than 72 characters, because git's own pages would cut it off.

Usage: `commit_subject.py FILE`, where FILE holds the commit message.
"""

from __future__ import annotations

import sys
from pathlib import Path

LONGEST = 72


def subject_of(message: str) -> str:
    """The first line that is neither empty nor a git comment."""
    lines = (line.strip() for line in message.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "")


def main(arguments: list[str]) -> int:
    subject = subject_of(Path(arguments[0]).read_text(encoding="utf-8"))
    if not subject:
        print("error: the commit message is empty", file=sys.stderr)
    elif len(subject) > LONGEST:
        print(f"error: the subject has {len(subject)} characters; allowed: {LONGEST}: {subject}", file=sys.stderr)
    return int(not 0 < len(subject) <= LONGEST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

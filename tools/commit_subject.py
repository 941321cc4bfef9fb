"""Refuses a commit whose subject is longer than git's own pages show: `commit_subject.py FILE`, FILE is the message."""

from __future__ import annotations

import sys
from pathlib import Path

LONGEST = 72


def subject_of(message: str) -> str:
    """The first line that is neither empty nor one of git's comments."""
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

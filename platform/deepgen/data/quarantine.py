"""Unusable records: the run lists them in a file, counts them, and stops if there are too many.

An unusable training record leaves its place in the batch empty (``deepgen.data.loading.collate``). An unusable prompt
is never drawn (``deepgen.data.usable``). No other record replaces either of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepgen.errors import UserError, writing
from deepgen.json_lines import drop_torn_end, read_lines
from deepgen.masking import masked

FILE = "quarantine.jsonl"
FILES = {"data.train": FILE, "data.prompts": "quarantine-prompts.jsonl", "data.heldout": "quarantine-heldout.jsonl"}
LOOK_AFTER = 200  # the share of bad records counts only after this many records
_LONGEST = 1000  # letters of an id or reason in the file
FEW_ROWS = 5  # up to this many different bad rows never end a run: one bad row of 50 is 2 %, and no reason to stop


@dataclass(frozen=True)
class BadRow:
    """An unusable row: file, row (from 1), the record's id ("" if it has none) and the reason.

    Wherever rows are compared or written, the file's name stands for it: all files of one key lie in one folder, and
    that folder is elsewhere on each node of a cluster (a submitted checkout).
    """

    file: str
    row: int
    id: str
    reason: str

    @property
    def place(self) -> tuple[str, int]:
        return place_of(self.file, self.row)


def place_of(file: str, row: int) -> tuple[str, int]:
    """What tells a row from others: the name of its file, and its number."""
    return Path(file).name, row


class Quarantine:
    """Counts bad rows and stops the run if there are too many.

    Every rank counts the bad rows of all ranks, so all ranks stop together. Rank 0 writes each row once.

    max_share: the run stops if the share of bad records among those read so far exceeds this, but only after
        LOOK_AFTER records and more than FEW_ROWS different bad rows; 0 stops at the first bad row. A record that a
        later epoch reads again counts again.
    folder: the run's folder. Unless the run is resumed, its file starts empty.
    key: one of FILES.
    """

    def __init__(
        self,
        max_share: float,
        folder: Path,
        *,
        key: str = "data.train",
        rank: int = 0,
        resume: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self._max_share, self._writes, self._say, self._key = max_share, rank == 0, say, key
        self.path = folder / FILES[key]
        self.read, self.bad = 0, 0
        self._rows: set[tuple[str, int]] = set()  # different bad rows; no need to keep more than FEW_ROWS + 1
        self._written: set[tuple[str, int]] = set()
        if self._writes and not resume:
            self.path.unlink(missing_ok=True)
        elif self._writes and self.path.exists():
            drop_torn_end(self.path)
            self._written = rows_in(self.path)[0]

    def add(self, read: int, rows: Sequence[BadRow]) -> None:
        """Count `read` records of all ranks, of which `rows` are bad. Raises UserError if too many are bad."""
        self.read += read
        self.bad += len(rows)
        for row in rows:
            if len(self._rows) <= FEW_ROWS:
                self._rows.add(row.place)
        if self._writes:
            self._write(rows)
        few, look_after = (FEW_ROWS, LOOK_AFTER) if self._max_share else (0, 0)
        if self.read >= look_after and len(self._rows) > few and self.bad > self._max_share * self.read:
            raise UserError(
                f"{self._key}: {self.bad / self.read:.1%} of {self.read:,} records read cannot be used; allowed: "
                f"{self._max_share:.1%} (data.max_bad_share); {self.path} lists them with reasons"
            )

    def state_dict(self) -> dict[str, Any]:
        """The counts, which are equal on all ranks; JSON-able."""
        return {"read": self.read, "bad": self.bad, "rows": sorted([*row] for row in self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read, self.bad = int(state["read"]), int(state["bad"])
        self._rows = {place_of(str(file), int(row)) for file, row in state["rows"]}

    def _write(self, rows: Sequence[BadRow]) -> None:
        new = {row.place: row for row in rows if row.place not in self._written}
        if not new:
            return
        if not self._written:
            first = next(iter(new.values()))
            reason = masked(first.reason)[:_LONGEST]
            self._say(f"{first.file}, row {first.row} is left out ({reason}); all such rows: {self.path}")
        with writing("unusable records", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(_line(row)) + "\n" for row in new.values())
        self._written |= new.keys()


def _line(row: BadRow) -> dict[str, Any]:
    return asdict(row) | {
        "file": row.place[0],
        "id": masked(row.id)[:_LONGEST],
        "reason": masked(row.reason)[:_LONGEST],
    }


def rows_in(path: Path) -> tuple[set[tuple[str, int]], bool]:
    """File's name and row of every line, and whether all lines are as they were written."""
    lines = list(read_lines(path)) if path.exists() else []
    rows = [(line.get("file"), line.get("row")) for line in lines if line]
    places = [place_of(file, row) for file, row in rows if isinstance(file, str) and isinstance(row, int)]
    return set(places), len(places) == len(lines)

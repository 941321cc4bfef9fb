"""The run's own record of its metrics: `metrics.jsonl`, one JSON object per line.

A line is `{"step": 3, "time": 1795365066.5, "metrics": {"reward/judge": 0.61}, "skipped": ["reward/ocr"]}`. Keys
without a value (None, NaN, infinite) are listed under `skipped`, never written as 0. Plots are drawn from this file.
After a change of server, its entries are sent to MLflow again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgen.json_lines import drop_torn_end, read_lines

FILE_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class Entry:
    """Metrics logged together: optimizer step, Unix time in seconds, finite values, keys without a value."""

    step: int
    time: float
    metrics: dict[str, float]
    skipped: list[str]


def make_entry(step: int, time: float, values: Mapping[str, Any]) -> Entry:
    """Split `values` into finite floats and keys without a value. Numbers may be Python, numpy or torch scalars."""
    metrics, skipped = {}, []
    for key, value in values.items():
        number = math.nan if value is None else float(value)
        if math.isfinite(number):
            metrics[key] = number
        else:
            skipped.append(key)
    return Entry(int(step), time, metrics, skipped)


class Journal:
    """Appends entries to `<folder>/metrics.jsonl`. Without `resume`, an older file is moved, never overwritten.

    What a full disk does not take stays in memory, in order, and is tried again with the next entry and in `close`.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.path = folder / FILE_NAME
        if self.path.exists() and not resume:
            self.path.rename(_free_name(self.path))
        if self.path.exists():
            drop_torn_end(self.path)
        self._file = self.path.open("ab", buffering=0)
        self._waiting = b""

    def append(self, entry: Entry) -> None:
        """Hand one line to the operating system. Raises OSError if it does not take all of it, ValueError if closed."""
        record: dict[str, Any] = {"step": entry.step, "time": round(entry.time, 3), "metrics": entry.metrics}
        if entry.skipped:
            record["skipped"] = entry.skipped
        self._waiting += json.dumps(record).encode() + b"\n"
        self._write()

    def close(self) -> None:
        """Raises OSError if some lines are lost, because they still cannot be written."""
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def read_entries(path: Path) -> Iterator[Entry]:
    """Entries in the order written. A line torn by a kill is skipped; only a process's last line can be torn."""
    for record in read_lines(path):
        if record and {"step", "time", "metrics"} <= record.keys():
            yield Entry(record["step"], record["time"], record["metrics"], record.get("skipped", []))


def read_steps(path: Path, last: int) -> list[tuple[int, dict[str, float]]]:
    """(step, all its metrics) up to step `last`, in order; [] without a file. The later of two values counts."""
    steps: dict[int, dict[str, float]] = {}
    for entry in read_entries(path) if path.exists() else ():
        if entry.step <= last:
            steps.setdefault(entry.step, {}).update(entry.metrics)
    return sorted(steps.items())


def read_series(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """For each metric, its steps in ascending order and the values.

    If a step was logged twice (a resumed run repeats the steps after its checkpoint), the later value counts.
    """
    values: dict[str, dict[int, float]] = {}
    for entry in read_entries(path):
        for key, value in entry.metrics.items():
            values.setdefault(key, {})[entry.step] = value
    return {key: (sorted(by_step), [by_step[step] for step in sorted(by_step)]) for key, by_step in values.items()}


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate

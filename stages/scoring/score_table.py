"""Scores of pictures as rows: for the console, and as parquet. A missing score is null with a reason, never 0."""

from __future__ import annotations

import io
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from stages.scoring.picture_list import one_line

ENDS = 5  # best and worst pictures on the console
_PROMPT = 60  # letters on the console


@dataclass(frozen=True)
class Scored:
    """A picture's scores by reward: a number, or why there is none (reason, detail). thumbnail: a small JPEG."""

    file: str
    id: str
    prompt: str
    task: str
    scores: Mapping[str, float | tuple[str, str]]
    thumbnail: bytes

    def value(self, reward: str) -> float | None:
        score = self.scores[reward]
        return None if isinstance(score, tuple) else score


def _printable(text: str) -> str:
    """One line of strangers' words, without what moves a terminal's cursor."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def sorted_by(rows: Sequence[Scored], reward: str) -> list[Scored]:
    """The best first; those without a score last, in their order."""
    return sorted(rows, key=lambda row: -value if (value := row.value(reward)) is not None else math.inf)


def parquet_bytes(rows: Sequence[Scored], rewards: Sequence[str]) -> bytes:
    """A file with file, id, prompt, task, and of each reward score/NAME (null if missing) and missing/NAME (why)."""
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in ("file", "id", "prompt", "task")
    }
    for reward in rewards:
        why = [
            ": ".join(filter(None, score)) if isinstance(score := row.scores[reward], tuple) else None for row in rows
        ]
        columns[f"score/{reward}"] = pa.array([row.value(reward) for row in rows], pa.float64())
        columns[f"missing/{reward}"] = pa.array(why, pa.string())
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def console_text(rows: Sequence[Scored], rewards: Sequence[str]) -> str:
    """A line for each reward, why scores of it are missing, and the best and worst pictures by the first one."""
    width = max(len("reward"), *map(len, rewards))
    lines = [f"{'reward':<{width}}  scored  missing      mean    spread     least    median      most"]
    for reward in rewards:
        values = [value for row in rows if (value := row.value(reward)) is not None]
        lines.append(f"{reward:<{width}}  {len(values):6}  {len(rows) - len(values):7}  {_statistics(values)}")
        details = Counter(score for row in rows if isinstance(score := row.scores[reward], tuple))
        lines += [f"  {count} x {reason}: {_printable(why)}" for (reason, why), count in details.most_common(ENDS)]
    ranked = [row for row in sorted_by(rows, rewards[0]) if row.value(rewards[0]) is not None]
    shown = ranked if len(ranked) <= 2 * ENDS else [*ranked[:ENDS], None, *ranked[-ENDS:]]
    lines += ["", f"by {rewards[0]}, best first:"] if shown else []
    for row in shown:
        file, prompt = ("", "") if row is None else (one_line(row.file), _printable(row.prompt)[:_PROMPT])
        lines.append("  ..." if row is None else f"  {row.value(rewards[0]):9.4f}  {file}  {prompt}")
    return "\n".join(lines)


def _statistics(values: Sequence[float]) -> str:
    if not values:
        return "  ".join(["       -"] * 5)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    found = (statistics.fmean(values), spread, min(values), statistics.median(values), max(values))
    return "  ".join(f"{value:8.4f}" for value in found)

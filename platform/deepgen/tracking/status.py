"""What a live rl run does, in `status.json`: the experience stream writes it, `stages/rl.py --status` reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepgen.errors import UserError
from deepgen.tracking.progress import format_duration

STATUS = "status.json"
_NAMED = 8  # busy actors in the watchdog's line


@dataclass(frozen=True)
class Call:
    """A call that goes on: the actor that works on it, what it is, when it began (Unix seconds)."""

    actor: str
    what: str
    since: float


@dataclass(frozen=True)
class GroupsOfStep:
    """How far the groups of one step are."""

    step: int
    groups: int
    sampled: int
    scored: int


@dataclass(frozen=True)
class Rank:
    """What a learner rank does: it waits for the batch of `step`, or works on it, since a moment in Unix seconds."""

    rank: int
    step: int
    waits: bool
    since: float


@dataclass(frozen=True)
class Status:
    """A run at one moment. Counts are since the stream's start; dicts have a value for each role or reward.

    time: Unix seconds. ended: the stream has been stopped. version: the newest published; None before the first.
    actors: how many there are of each role.
    """

    time: float
    ended: bool
    steps: int
    version: int | None
    actors: dict[str, int]
    calls: tuple[Call, ...]
    under_way: tuple[GroupsOfStep, ...]
    learner: tuple[Rank, ...]
    open_requests: dict[str, int]
    missing: dict[str, int]
    restarts: dict[str, int]


def status_to_json(status: Status) -> str:
    return json.dumps(asdict(status), indent=1)


def write_status(folder: Path, text: str) -> None:
    """Replace the file in one go: a reader sees the old or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{STATUS}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / STATUS)


def read_status(folder: Path) -> Status | None:
    """The run's last status, or None if its stream has not written any. Raises UserError if the file is damaged."""
    path = folder / STATUS
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["calls"] = tuple(Call(**call) for call in content["calls"])
        content["under_way"] = tuple(GroupsOfStep(**step) for step in content["under_way"])
        content["learner"] = tuple(Rank(**rank) for rank in content["learner"])
        return Status(**content)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: not a run's status ({error}); a run that goes on replaces it") from error


def silence_text(status: Status, seconds: float) -> str:
    """One line that says who waits for whom, after `seconds` in which nothing has moved."""
    busy = [f"{call.actor} for {age(call.since, status)} ({call.what})" for call in status.calls]
    more = [f"and {len(busy) - _NAMED} more"] if len(busy) > _NAMED else []
    ranks = [rank_text(rank, status) for rank in status.learner] or ["the learner has not asked for a batch yet"]
    return (
        f"nothing has moved for {format_duration(seconds)}; "
        f"busy: {', '.join([*busy[:_NAMED], *more]) or 'nobody'}; "
        f"open requests: {counts_text(status.open_requests)}; {'; '.join(_first(ranks))}"
    )


def rank_text(rank: Rank, status: Status) -> str:
    does = "has waited for the batch" if rank.waits else "has had the batch"
    return f"learner {rank.rank} {does} of step {rank.step} for {age(rank.since, status)}"


def age(since: float, status: Status) -> str:
    """Time from `since` to the status, e.g. 0:42."""
    return format_duration(max(0.0, status.time - since))


def counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items()) or "none"


def _first(lines: Sequence[str]) -> Iterable[str]:
    more = len(lines) - _NAMED
    return [*lines[:_NAMED], f"and {more} more ranks"] if more > 0 else lines

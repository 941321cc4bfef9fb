"""Phase times of a run that has been, read out of its timeline (`deepgen.tracking.timeline`).

They are those of its machine and its settings, with all that Ray and the network added: medians, so that a moment in
which the machine did something else does not count. The first step is left out. In a run that took its groups one by
one, what its update did after the last of them is `step_s`; in another one nobody can tell, and all of it counts as the
groups'.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from deepgen.errors import UserError
from deepgen.planning.scale.phases import MEASURED, CallTime, Figure, PhaseFigures, ScoreFigure
from deepgen.tracking.timeline import LEARNER, ROLLOUT, Span, read_spans

_SIZE = re.compile(r"score of (\d+) images")


def measured_phases(folder: Path) -> PhaseFigures:
    """The phases that a run's timeline tells; the others are left out. Raises UserError if it has no whole steps."""
    spans = [span for span in read_spans(folder) if span.step != 0 or span.role != ROLLOUT]
    samples = [span for span in spans if (span.role, span.what) == (ROLLOUT, "sample")]
    updates = [span for span in spans if (span.role, span.what) == (LEARNER, "update") and span.step]
    if not samples or not updates:
        raise UserError(f"--simulate: from={folder}: no step after the first one in its timeline; allowed: an rl run")
    sample, load = _drawing(samples)
    update, rest = _updating(samples, updates, spans)
    numbers = {"sample_s": sample, "load_s": load, "update_s": update, "step_s": rest}
    for name, what in (("publish_s", "publish"), ("checkpoint_s", "checkpoint")):
        found = [_seconds(span) for span in spans if (span.role, span.what) == (LEARNER, what) and span.step]
        if found:
            numbers[name] = statistics.median(found)
    if sync := _syncs(spans):
        numbers["sync_s"] = statistics.median(sync)
    if revived := [_seconds(span) for span in spans if (span.role, span.what) == (ROLLOUT, "start")]:
        numbers["revive_s"] = statistics.median(revived)
    figures = {name: Figure(value, MEASURED, str(folder)) for name, value in numbers.items()}
    return PhaseFigures(figures, _scoring(spans, str(folder)))


def _drawing(samples: Iterable[Span]) -> tuple[float, float]:
    """Seconds of a group, and what the first group of a version takes more. That is 0 where all groups are first."""
    first, later, seen = list[float](), list[float](), set[tuple[str, int | None]]()
    for span in samples:
        (later if (span.actor, span.version) in seen else first).append(_seconds(span))
        seen.add((span.actor, span.version))
    usual = statistics.median(later or first)
    return usual, max(0.0, statistics.median(first) - usual)


def _updating(samples: Sequence[Span], updates: Sequence[Span], spans: Sequence[Span]) -> tuple[float, float]:
    """Seconds of the learner for one group of a rank, and of the rest of an update: `update_s` and `step_s`."""
    ranks = len({span.actor for span in updates})
    share = max(1, statistics.mode(Counter(span.step for span in samples).values()) // ranks)  # groups of a rank
    waits = defaultdict[tuple[str, int | None], list[Span]](list)
    for span in spans:
        if (span.role, span.what) == (LEARNER, "wait"):
            waits[span.actor, span.step].append(span)
    groups, rests = list[float](), list[float]()
    for update in updates:
        inside = [wait for wait in waits[update.actor, update.step] if update.begin <= wait.begin < update.end]
        borders = [(update.begin, update.begin), *((wait.begin, wait.end) for wait in inside), (update.end, update.end)]
        work = [after[0] - before[1] for before, after in itertools.pairwise(borders)]
        arrived = len(inside) >= share  # one by one: before the first there is no work
        groups.append(sum(work[: share + 1] if arrived else work) / share)
        rests.append(sum(work[share + 1 :]) if arrived else 0.0)
    return statistics.median(groups), statistics.median(rests)


def _syncs(spans: Iterable[Span]) -> list[float]:
    """Seconds from the learner's copy of each version to its last arrival at an actor."""
    copied, arrived = dict[int, float](), dict[int, float]()
    for span in spans:
        if (span.actor, span.what) == (f"{LEARNER} 0", "publish") and span.step is not None:
            copied[span.step + 1] = span.end
        elif span.what == "fetch weights" and span.version is not None:
            arrived[span.version] = max(arrived.get(span.version, 0.0), span.end)
    return [max(0.0, arrived[version] - end) for version, end in copied.items() if version in arrived]


def _scoring(spans: Iterable[Span], why: str) -> dict[str, ScoreFigure]:
    """Of each reward: seconds a call and an image, by least squares over its calls."""
    calls = defaultdict[str, list[tuple[int, float]]](list)
    for span in spans:
        if span.what == "score" and (found := _SIZE.match(span.call)):
            calls[span.role].append((int(found[1]), _seconds(span)))
    return {name: ScoreFigure(_fit(found), MEASURED, why) for name, found in calls.items()}


def _fit(calls: Sequence[tuple[int, float]]) -> CallTime:
    sizes, seconds = zip(*calls, strict=True)
    mean, mean_s = statistics.fmean(sizes), statistics.fmean(seconds)
    if len(set(sizes)) == 1:
        return CallTime(0.0, mean_s / mean)
    slope, start = statistics.linear_regression(sizes, seconds)
    if slope < 0:
        return CallTime(mean_s, 0.0)
    return CallTime(start, slope) if start >= 0 else CallTime(0.0, mean_s / mean)


def _seconds(span: Span) -> float:
    return span.end - span.begin

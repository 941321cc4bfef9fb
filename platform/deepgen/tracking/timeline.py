"""The timeline of an rl run: which actor did what, from when to when.

Every process that gives others work, or works itself, appends spans to a file of its own in the run folder:
`timeline-stream.jsonl` has the calls of rollout actors and reward replicas, `timeline-learner-0.jsonl` the phases of
rank 0. A line is `{"actor": "rollout-0", "role": "rollout", "what": "sample", "begin": 1795365066.5314, "end":
1795365069.1002, "call": "sample_group of group 6 of step 3", "step": 3, "version": 3}`, without what is not known.
Times are Unix seconds of the writer's node. A resumed run appends.

Bounded: a file that has reached MAX_BYTES becomes `timeline-stream.1.jsonl` and replaces the one before it. Pictures
and traces show the newest steps.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from deepgen.json_lines import read_lines

log = logging.getLogger(__name__)

MAX_BYTES = 16 << 20  # about 80,000 spans
LEARNER, ROLLOUT = "learner", "rollout"  # roles; a reward pool's role is its name
_FLUSH_S = 1.0
_KEPT = 50_000  # finished spans kept in memory, far more than a step has
_START = time.time() - time.monotonic()


def unix_now() -> float:
    """Unix time in seconds, from a clock that nobody sets back while the process lives."""
    return _START + time.monotonic()


@dataclass(frozen=True)
class Span:
    """What an actor did between two moments (Unix seconds). `end` is infinite while it goes on.

    what: the kind of work, which has a colour: sample, evaluate, fetch weights, start, score, wait, update, ...
    call: the same in full, for a person. step, version: training step and policy version, where the work has one.
    """

    actor: str
    role: str
    what: str
    begin: float
    end: float = math.inf
    call: str = ""
    step: int | None = None
    version: int | None = None


class Recorder:
    """Records the spans of one process, for one thread. `writer` names its file in `folder`; without folder, no file.

    A file that cannot be written ends the timeline with a warning, not the run.
    """

    def __init__(
        self,
        folder: Path | None = None,
        writer: str = "",
        *,
        clock: Callable[[], float] = unix_now,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.clock, self._max_bytes = clock, max_bytes
        self.moved = clock()  # when a span last began or ended
        self._path = folder / f"timeline-{writer}.jsonl" if folder else None
        self._file: BinaryIO | None = None
        self._flushed = -math.inf
        self._open: dict[int, Span] = {}
        self._finished: deque[Span] = deque(maxlen=_KEPT)  # by their end

    def begin(self, actor: str, role: str, what: str, **more: Any) -> Span:
        """A span that begins now. `more`: its `call`, `step` and `version`."""
        span = Span(actor, role, what, self.clock(), **more)
        self._open[id(span)], self.moved = span, span.begin
        return span

    def end(self, span: Span) -> None:
        """The span ends now; it must have begun here."""
        del self._open[id(span)]
        self.moved = self.clock()
        self.add(replace(span, end=self.moved))

    def add(self, span: Span) -> None:
        """Record a span that has ended just now."""
        self._finished.append(span)
        if self._path is None:
            return
        try:
            self._write(self._path, span)
        except OSError as error:
            log.warning("the timeline ends here: cannot write %s: %s", self._path, error.strerror or error)
            self._path = None

    def open(self, role: str | None = None) -> list[Span]:
        """The spans that go on, of one role or of all, the oldest first."""
        return sorted((s for s in self._open.values() if role in (None, s.role)), key=lambda span: span.begin)

    def since(self, begin: float) -> list[Span]:
        """Spans that went on after `begin`, also those that still do. Forgets older ones."""
        while self._finished and self._finished[0].end <= begin:
            self._finished.popleft()
        return [*self._finished, *self._open.values()]

    def flush(self) -> None:
        """Hand what has been recorded to the operating system."""
        if self._file is None or self._path is None:
            return
        self._flushed = self.clock()
        try:
            self._file.flush()
        except OSError as error:
            log.warning("the timeline ends here: cannot write %s: %s", self._path, error.strerror or error)
            self._path = None

    def _write(self, path: Path, span: Span) -> None:
        if self._file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            if self._file.tell():  # another process's last line may be cut
                self._file.write(b"\n")
        content = vars(span) | {"begin": round(span.begin, 4), "end": round(span.end, 4)}
        known = {key: value for key, value in content.items() if value not in (None, "")}
        self._file.write(json.dumps(known).encode() + b"\n")
        if self.clock() - self._flushed >= _FLUSH_S:
            self.flush()
            if self._file.tell() >= self._max_bytes:
                self._file.close()
                path.replace(path.with_suffix(".1.jsonl"))
                self._file = None


def read_spans(folder: Path) -> list[Span]:
    """All spans in a run's folder by their begin. Lines that a kill has cut are left out."""
    spans = []
    for file in folder.glob("timeline-*.jsonl"):
        spans += [Span(**line) for line in read_lines(file) if line]
    return sorted(spans, key=lambda span: span.begin)


# -- what spans say ---------------------------------------------------------------------------------------------------


def busy_share(spans: Iterable[Span], begin: float, end: float, actors: int) -> float:
    """Share of the time from `begin` to `end` that `actors` actors spent in spans, mean over them, 0..1.

    Spans of one actor may overlap. An actor without spans has done nothing.
    """
    if not (end > begin and actors > 0):
        raise ValueError(f"busy share of {actors} actors from {begin} to {end}")
    until: dict[str, float] = {}  # actor -> end of what has been counted
    busy = 0.0
    for span in sorted(spans, key=lambda span: span.begin):
        start = max(begin, span.begin, until.get(span.actor, begin))
        stop = min(end, span.end)
        if stop > start:
            busy += stop - start
            until[span.actor] = stop
    return busy / (actors * (end - begin))


def step_borders(spans: Iterable[Span]) -> list[tuple[float, int]]:
    """When rank 0 had the batch of each step, and the step, in the order of time."""
    waits = (span for span in spans if (span.actor, span.what) == (f"{LEARNER} 0", "wait"))
    return sorted((span.end, span.step) for span in waits if span.step is not None)


def newest_steps(spans: Sequence[Span], steps: int) -> list[Span]:
    """The spans since rank 0 had the batch of the step before the newest `steps`; all of them if there are fewer."""
    borders = step_borders(spans)
    begin = borders[-steps - 1][0] if len(borders) > steps else -math.inf
    return [span for span in spans if span.end > begin]


def roles_in_order(spans: Iterable[Span]) -> list[str]:
    """Roles in the order of a group's way: rollout, reward pools by name, learner."""
    return sorted({span.role for span in spans}, key=lambda role: ({ROLLOUT: 0, LEARNER: 2}.get(role, 1), role))


def actors_in_order(spans: Iterable[Span], role: str) -> list[str]:
    """The actors of a role by name and number: rollout-2 before rollout-10."""
    names = {span.actor for span in spans if span.role == role}
    return sorted(names, key=lambda name: (len(name), name))


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """The spans in Chrome's trace event format, for https://ui.perfetto.dev: a process a role, a thread an actor.

    Times are microseconds since the first span. Work of one actor that overlaps other work of it (weights that arrive
    while it samples) has a row of its own, because spans of one thread must not overlap.
    """
    first = min((span.begin for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    threads = count(1)
    for process, role in enumerate(roles_in_order(spans), start=1):
        events += _names("process", process, 0, role)
        for actor in actors_in_order(spans, role):
            for lane, row in enumerate(_lanes([span for span in spans if span.actor == actor])):
                thread = next(threads)
                events += _names("thread", process, thread, actor if lane == 0 else f"{actor} ({lane + 1})")
                events += [_event(span, process, thread, first) for span in row]
    return {"displayTimeUnit": "ms", "traceEvents": events, "otherData": {"begin_unix_s": first}}


def _lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """The spans in as few rows as possible, so that those of a row do not overlap."""
    lanes: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.begin):
        free = next((lane for lane in lanes if lane[-1].end <= span.begin), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes


def _names(kind: str, process: int, thread: int, name: str) -> list[dict[str, Any]]:
    order = process if kind == "process" else thread
    place = {"ph": "M", "pid": process, "tid": thread}
    return [
        {"name": f"{kind}_name", **place, "args": {"name": name}},
        {"name": f"{kind}_sort_index", **place, "args": {"sort_index": order}},
    ]


def _event(span: Span, process: int, thread: int, first: float) -> dict[str, Any]:
    known = {"call": span.call, "step": span.step, "version": span.version}
    return {
        "name": span.what if span.step is None else f"{span.what} {span.step}",
        "cat": span.what,
        "ph": "X",
        "pid": process,
        "tid": thread,
        "ts": round((span.begin - first) * 1e6),
        "dur": round((span.end - span.begin) * 1e6),
        "args": {key: value for key, value in known.items() if value not in (None, "")},
    }

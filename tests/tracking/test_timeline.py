"""Spans of a run: what is recorded survives a kill, and what it says of idle actors is right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from deepgen.tracking.timeline import (
    Recorder,
    Span,
    actors_in_order,
    busy_share,
    chrome_trace,
    newest_steps,
    read_spans,
    roles_in_order,
)
from deepgen.tracking.timeline_picture import PICTURE, TRACE, draw_timeline, write_timeline


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def wait(step: int, begin: float, end: float) -> Span:
    return Span("learner 0", "learner", "wait", begin, end, step=step)


RUN = [
    Span("rollout-0", "rollout", "sample", 0, 4, "sample_group of group 0 of step 0", 0, 0),
    Span("rollout-0", "rollout", "fetch weights", 3, 5, version=1),
    Span("rollout-1", "rollout", "sample", 1, 3, step=0, version=0),
    Span("clip reward #0", "clip", "score", 4, 5),
    wait(0, 0, 6),
    Span("learner 0", "learner", "update", 6, 9, step=0),
    wait(1, 9, 12),
    Span("learner 0", "learner", "update", 12, 14, step=1),
]


# -- recording -------------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    clock = Clock()
    recorder = Recorder(tmp_path / "run", "stream", clock=clock)
    span = recorder.begin("rollout-0", "rollout", "sample", call="sample_group of group 3", step=1, version=0)
    other = recorder.begin("clip reward #0", "clip", "score")
    assert recorder.open() == [span, other] and recorder.open("clip") == [other]
    assert math.isinf(span.end)
    clock.now = 103.0
    recorder.end(span)
    recorder.flush()
    assert recorder.moved == 103
    expected = Span("rollout-0", "rollout", "sample", 100, 103, "sample_group of group 3", 1, 0)
    assert read_spans(tmp_path / "run") == [expected]
    assert recorder.since(102) == [expected, other]
    assert recorder.since(103) == [other]  # what has ended by then is forgotten


def test_a_resumed_run_appends_behind_the_line_that_a_kill_has_cut(tmp_path: Path) -> None:
    first = Recorder(tmp_path, "stream")
    first.add(RUN[0])
    first.add(RUN[1])
    first.flush()
    file = tmp_path / "timeline-stream.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    again = Recorder(tmp_path, "stream")
    again.add(RUN[3])
    again.flush()
    learner = Recorder(tmp_path, "learner-0")
    learner.add(RUN[5])
    learner.flush()
    assert read_spans(tmp_path) == [RUN[0], RUN[3], RUN[5]]


def test_the_files_of_a_long_run_stay_small(tmp_path: Path) -> None:
    clock = Clock()
    recorder = Recorder(tmp_path, "stream", clock=clock, max_bytes=1000)
    for second in range(200):
        clock.now = second
        recorder.add(Span("rollout-0", "rollout", "sample", second, second + 1, step=second))
    recorder.flush()
    assert {file.name for file in tmp_path.iterdir()} == {"timeline-stream.jsonl", "timeline-stream.1.jsonl"}
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2400
    steps = [span.step for span in read_spans(tmp_path)]
    assert steps == list(range(200))[-len(steps) :] and len(steps) > 8


def test_a_full_disk_ends_the_timeline_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("in the way")
    recorder = Recorder(tmp_path / "run", "stream")
    recorder.add(RUN[0])
    recorder.add(RUN[1])
    assert caplog.text.count("the timeline ends here: cannot write") == 1
    assert recorder.since(0) == RUN[:2]


# -- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "end", "actors", "share"),
    [
        (0, 10, 2, (5 + 2) / 20),  # sampling and fetching overlap, and count once
        (2, 4, 2, (2 + 1) / 4),
        (5, 6, 2, 0),
        (0, 10, 4, (5 + 2) / 40),  # two actors without a span
    ],
)
def test_busy_share_is_the_mean_over_actors(begin: float, end: float, actors: int, share: float) -> None:
    assert busy_share(RUN[:3], begin, end, actors) == pytest.approx(share)


def test_a_span_that_goes_on_is_busy_until_now() -> None:
    assert busy_share([Span("a", "rollout", "sample", 3)], 2, 4, 1) == 0.5
    with pytest.raises(ValueError, match=r"busy share of 1 actors from 4 to 4"):
        busy_share([], 4, 4, 1)


def test_the_newest_steps_begin_with_the_batch_before_them() -> None:
    assert newest_steps(RUN, 1) == RUN[5:]
    assert newest_steps(RUN, 2) == RUN


def test_rows_are_in_the_order_of_a_groups_way() -> None:
    assert roles_in_order(reversed(RUN)) == ["rollout", "clip", "learner"]
    many = [Span(f"rollout-{i}", "rollout", "sample", 0, 1) for i in (10, 2, 0)]
    assert actors_in_order(many, "rollout") == ["rollout-0", "rollout-2", "rollout-10"]


def test_the_trace_has_a_process_a_role_and_a_thread_an_actor() -> None:
    later = [replace(span, begin=span.begin + 7, end=span.end + 7) for span in RUN]
    trace = json.loads(json.dumps(chrome_trace(later)))
    named = [event for event in trace["traceEvents"] if event["name"] in ("process_name", "thread_name")]
    assert [event["args"]["name"] for event in named] == [
        *("rollout", "rollout-0", "rollout-0 (2)", "rollout-1"),  # weights that arrive while it samples: a second row
        *("clip", "clip reward #0", "learner", "learner 0"),
    ]
    assert trace["otherData"] == {"begin_unix_s": 7}
    first = next(event for event in trace["traceEvents"] if event["ph"] == "X")
    call = {"call": "sample_group of group 0 of step 0", "step": 0, "version": 0}
    assert (first["name"], first["ts"], first["dur"], first["args"]) == ("sample 0", 0, 4_000_000, call)
    by_thread: dict[int, list[tuple[int, int]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            by_thread.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, by_thread.values())) == len(RUN)
    for spans in by_thread.values():
        assert all(one[1] <= other[0] for one, other in pairwise(spans))


def test_trace_and_picture_of_a_run(tmp_path: Path) -> None:
    assert write_timeline(tmp_path, "try") == []
    recorder = Recorder(tmp_path, "stream")
    for span in RUN:
        recorder.add(span)
    recorder.flush()
    assert write_timeline(tmp_path, "try") == [tmp_path / TRACE, tmp_path / PICTURE]
    assert len(json.loads((tmp_path / TRACE).read_text())["traceEvents"]) > len(RUN)
    with Image.open(tmp_path / PICTURE, formats=("PNG",)) as picture:
        assert picture.width > 1000


def test_a_picture_of_many_actors_stays_a_picture(tmp_path: Path) -> None:
    many = [Span(f"rollout-{i}", "rollout", "sample", i / 100, 6, step=0) for i in range(512)]
    draw_timeline([*many, *RUN[4:6]], tmp_path / "many.png")
    with Image.open(tmp_path / "many.png", formats=("PNG",)) as picture:
        assert picture.height < 1000

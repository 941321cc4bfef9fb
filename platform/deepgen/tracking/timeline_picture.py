"""The timeline of a run as files for people: `timeline.json` for Perfetto, `timeline.png` with the newest steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepgen.errors import writing
from deepgen.tracking.timeline import (
    LEARNER,
    Span,
    actors_in_order,
    busy_share,
    chrome_trace,
    newest_steps,
    read_spans,
    roles_in_order,
    step_borders,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

    from deepgen.tracking.tracker import Tracker

TRACE, PICTURE = "timeline.json", "timeline.png"
_TRACE_STEPS, _PICTURE_STEPS = 100, 4
_ROWS_OF_A_ROLE = 12  # more actors than that are not told apart in a picture
_COLOURS = {
    "sample": "#3b76b8",
    "evaluate": "#9cc3e6",
    "fetch weights": "#f2a13c",
    "start": "#8d8d8d",
    "score": "#4fa46b",
    "update": "#b8433b",
    "publish": "#d9701e",
    "checkpoint": "#7d5ba6",
    "wait": "#f6e3e1",
}
_OTHER = "#c9a227"
# Shares of the width below which a step's number does not fit into its bar, and an edge would hide the bar.
_NARROW, _EDGE = 0.025, 0.004


def write_timeline(folder: Path, title: str) -> list[Path]:
    """Write trace and picture of the run in `folder`. Returns their paths; nothing if no span has been recorded."""
    spans = read_spans(folder)
    if not spans:
        return []
    trace, picture = folder / TRACE, folder / PICTURE
    with writing("the timeline", folder):
        trace.write_text(json.dumps(chrome_trace(newest_steps(spans, _TRACE_STEPS))), encoding="utf-8")
        draw_timeline(spans, picture, title=title)
    return [trace, picture]


def log_timeline(tracker: Tracker, title: str) -> list[Path]:
    """Write trace and picture, and attach them to the MLflow run. Returns their paths."""
    paths = write_timeline(tracker.folder, title)
    for path in paths:
        tracker.log_file(path)
    return paths


def draw_timeline(spans: Sequence[Span], output: Path, *, title: str = "", steps: int = _PICTURE_STEPS) -> None:
    """Draw the newest `steps` steps into `output` (PNG): a row an actor, a colour a phase, a line where a step begins.

    A step begins when the learner has the batch of the step before, as the metrics `idle/<role>` count it. What lies
    after the learner's last phase (the evaluation at the end) is left out if the learner has worked at all. Numbers in
    bars are training steps; those at the right are shares of time without work.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    borders = step_borders(spans)
    learner = [span for span in spans if span.role == LEARNER]
    begin = borders[-steps - 1][0] if len(borders) > steps else min(span.begin for span in learner or spans)
    end = max(span.end for span in learner or spans)
    shown = [span for span in spans if span.end > begin and span.begin < end]
    rows = _rows(shown)
    figure = Figure(figsize=(13, 1.7 + 0.34 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (_, own) in enumerate(rows):
        _draw_row(axes, place, own, begin, end)
    _draw_borders(axes, borders, begin, end)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, end - begin)
    axes.set_xlabel("seconds", fontsize=9)
    axes.tick_params(labelsize=8, length=0, axis="y")
    axes.tick_params(labelsize=8, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    _draw_legend(axes, shown)
    if title:
        axes.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=20)
    figure.savefig(output)


def _rows(spans: Sequence[Span]) -> list[tuple[str, list[Span]]]:
    """Names and spans of the rows, by role. Of a large role, the first actors and a row that counts the others."""
    rows: list[tuple[str, list[Span]]] = []
    for role in roles_in_order(spans):
        actors = actors_in_order(spans, role)
        rows += [(name, [span for span in spans if span.actor == name]) for name in actors[:_ROWS_OF_A_ROLE]]
        if more := len(actors) - _ROWS_OF_A_ROLE:
            rows += [(f"and {more} more", [])] if more > 0 else []
    return rows


def _draw_row(axes: Axes, place: int, spans: Sequence[Span], begin: float, end: float) -> None:
    axes.axhline(place, color="#e4e4e4", linewidth=0.8, zorder=0)
    for span in sorted(spans, key=lambda span: span.what == "fetch weights"):  # narrow ones on top of what they overlap
        left, right = max(span.begin, begin) - begin, min(span.end, end) - begin
        height = 0.4 if span.what == "fetch weights" else 0.72
        (bar,) = axes.barh(place, right - left, left=left, height=height, zorder=2)
        _paint(bar, span.what, edge=right - left > _EDGE * (end - begin))
        if span.step is not None and span.what in ("sample", "update") and right - left > _NARROW * (end - begin):
            middle = (left + right) / 2
            axes.text(middle, place, str(span.step), ha="center", va="center", fontsize=7, color="white", zorder=3)
    if spans:
        working = [span for span in spans if span.what != "wait"]
        share = f"{1 - busy_share(working, begin, end, 1):.0%} idle"
        axes.text(1.005, place, share, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color="#555555")


def _draw_borders(axes: Axes, borders: Sequence[tuple[float, int]], begin: float, end: float) -> None:
    for moment, step in borders:
        if begin <= moment <= end:
            axes.axvline(moment - begin, color="#333333", linewidth=0.9, linestyle=(0, (4, 3)), zorder=4)
            axes.annotate(
                f"batch {step}",
                (moment - begin, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="#333333",
            )


def _draw_legend(axes: Axes, spans: Sequence[Span]) -> None:
    from matplotlib.patches import Patch

    present = {span.what for span in spans}
    named = [what for what in _COLOURS if what in present] + sorted(present - _COLOURS.keys())
    patches = [Patch(label=what) for what in named]
    for patch, what in zip(patches, named, strict=True):
        _paint(patch, what)
    axes.figure.legend(handles=patches, ncols=len(patches), loc="outside lower center", fontsize=8, frameon=False)


def _paint(patch: Patch, what: str, *, edge: bool = True) -> None:
    """The colour of a kind of work. Waiting is hatched: it is no work. Without an edge, the smallest bar shows."""
    patch.set_facecolor(_COLOURS.get(what, _OTHER))
    patch.set_edgecolor("#d9aaa6" if what == "wait" else "white" if edge else _COLOURS.get(what, _OTHER))
    patch.set_hatch("////" if what == "wait" else "")
    patch.set_linewidth(0.5)

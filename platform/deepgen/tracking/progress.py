"""Console lines of a run: its progress, its speed and the time left."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_WINDOW = 20  # recent steps in the estimate


class Progress:
    """Estimates the time left of a run of `total` steps that begins after `start` finished ones (a resumed run).

    The estimate is the median duration of the last steps times the number of steps left. A first step that loads and
    warms up, or a step with an evaluation, does not distort it.
    """

    def __init__(self, total: int, start: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self._step = start
        self._clock = clock
        self._last = clock()
        self._durations: deque[float] = deque(maxlen=_WINDOW)  # seconds per step

    def line(self, step: int, fields: Mapping[str, float | int | str | None]) -> str:
        """Text for `step` finished steps, e.g. `step 12/60  judge 0.612  clip 0.310  8.4 s/step  6:43 left`.

        Fields that are None or NaN show as `-`: a missing value is not 0.
        """
        now = self._clock()
        if step > self._step:
            self._durations.append((now - self._last) / (step - self._step))
            self._step, self._last = step, now
        parts = [f"step {step:>{len(str(self.total))}}/{self.total}"]
        parts += [f"{name} {format_value(value)}" for name, value in fields.items()]
        if self._durations:
            parts.append(f"{statistics.median(self._durations):.1f} s/step")
            parts.append(f"{format_duration(self.seconds_left())} left")
        return "  ".join(parts)

    def seconds_left(self) -> float:
        """Seconds until the last step is done; NaN before the first step."""
        if not self._durations:
            return math.nan
        return statistics.median(self._durations) * max(0, self.total - self._step)


class Phases:
    """Seconds per named phase of a step: `with phases("rollout"): ...`.

    The time of a phase inside another one counts for the inner one alone. What `add` brings from elsewhere may overlap
    (reward scoring while other groups are sampled), so the sum can exceed the step's time.
    `ended(name, begin, end)`, in seconds of `clock`, is called when a phase has ended.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        ended: Callable[[str, float, float], None] = lambda name, begin, end: None,
    ) -> None:
        self._clock, self._ended = clock, ended
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []  # of each phase that goes on: seconds of those inside it

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            end = self._clock()
            self.add(name, end - begin - self._inner.pop())
            if self._inner:
                self._inner[-1] += end - begin
            self._ended(name, begin, end)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere, e.g. inside an actor."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last `take`."""
        return dict(self._seconds)

    def take(self) -> dict[str, float]:
        """Metrics `time/<phase>_s` of the step that ends. The next step starts from 0."""
        metrics = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return metrics


def format_value(value: float | int | str | None) -> str:
    """Short text of a value; `-` for None and NaN."""
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return str(value)
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.2e}"


def format_duration(seconds: float) -> str:
    """`0:42`, `6:44`, `1:02:03`; `?` for NaN."""
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

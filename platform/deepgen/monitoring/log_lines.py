"""Lines in logs say who speaks: role, name or rank, node. With DEEPGEN_LOG=json each is one JSON object.

    rollout-3 on node1: cannot reach ...
    {"time": "2026-11-26T20:03:08.120Z", "level": "WARNING", "role": "rollout", "name": "rollout-3", "rank": null,
     "node": "node1", "run": "tiny-rl", "job": "02000000", "pid": 4242, "logger": "actors...", "message": "cannot ..."}

As JSON, what a library prints is such a line, too; only what compiled code writes past Python is not. Secrets are
hidden (`deepgen.masking`). Not used: ray.LoggingConfig, which knows neither roles nor ranks, and hides no secrets.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from deepgen.masking import masked
from deepgen.monitoring.variables import LOG

DRIVER = "driver"
# A worker's line that Ray shows at the driver, "(RolloutActor pid=1, ip=10.0.0.1) line"; on a terminal with colours.
_SHOWN_BY_RAY = re.compile(r"(?:\x1b\[\d+m)?\([^()]*pid=\d+[^()]*\)(?:\x1b\[0m)? (?P<line>\{.*\})")
_MARK_OF_RAY = re.compile(r":(?:job_id|actor_name|task_name):")  # says whose the next lines of a worker's log are
_TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Speaker:
    """Who writes lines. name: of an actor. rank: of a learner. run: the run's name, "" outside of runs."""

    role: str
    name: str = ""
    rank: int | None = None
    run: str = ""

    def __str__(self) -> str:
        return self.name or (self.role if self.rank is None else f"{self.role} {self.rank}")


def set_up_logs(speaker: Speaker) -> None:
    """Let all lines of this process name the speaker, from now on. Called again, the last speaker counts."""
    as_json = os.environ.get(LOG) == "json"
    formatter: logging.Formatter = JsonFormatter(speaker) if as_json else HumanFormatter(speaker)
    root = logging.getLogger()
    for handler in [one for one in root.handlers if _to_console(one)]:  # Ray Train's workers have one
        root.removeHandler(handler)
    ours = _ToStderr()
    ours.setFormatter(formatter)
    root.addHandler(ours)
    if as_json:
        sys.stdout, sys.stderr = (_wrapped(stream, speaker) for stream in (sys.stdout, sys.stderr))


class HumanFormatter(logging.Formatter):
    """`who on node: message`; of the driver, whose console it is, the message alone."""

    def __init__(self, speaker: Speaker) -> None:
        super().__init__()
        self._start = "" if speaker.role == DRIVER else f"{speaker} on {socket.gethostname()}: "

    def format(self, record: logging.LogRecord) -> str:
        return masked(self._start + super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object without line breaks. A traceback is in `error`."""

    def __init__(self, speaker: Speaker) -> None:
        super().__init__()
        self._speaker = speaker

    def format(self, record: logging.LogRecord) -> str:
        error = self.formatException(record.exc_info) if record.exc_info else ""
        return json_line(
            self._speaker, record.levelname, record.getMessage(), record.created, logger=record.name, error=error
        )


def json_line(speaker: Speaker, level: str, message: str, seconds: float, *, logger: str = "", error: str = "") -> str:
    """seconds: Unix time. logger, error: left out if empty."""
    entry: dict[str, Any] = {
        "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z",
        "level": level,
        "role": speaker.role,
        "name": str(speaker),
        "rank": speaker.rank,
        "node": socket.gethostname(),
        "run": speaker.run,
        "job": _job(),
        "pid": os.getpid(),
        "message": masked(message),
    }
    entry |= {"logger": logger} if logger else {}
    entry |= {"error": masked(error)} if error else {}
    return json.dumps(entry, ensure_ascii=False)


def _job() -> str:
    """The Ray job's id; "" in a process that is not connected."""
    ray = sys.modules.get("ray")
    if ray is None or not hasattr(ray, "is_initialized") or not ray.is_initialized():
        return ""
    return str(ray.get_runtime_context().get_job_id())


class _ToStderr(logging.StreamHandler):
    """Writes to what sys.stderr is at the time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.WARNING)  # as Python does without any handler

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, stream: Any) -> None:
        raise AttributeError("always sys.stderr")


def _to_console(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return stream is not None and stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)


def _wrapped(stream: Any, speaker: Speaker) -> JsonLines:
    return JsonLines(stream.below if isinstance(stream, JsonLines) else stream, speaker)


class JsonLines(io.TextIOBase):
    """A console stream that makes JSON of what is not JSON yet. A traceback that is printed at once is one object."""

    def __init__(self, below: Any, speaker: Speaker) -> None:
        self.below = below
        self._speaker = speaker
        self._of_thread = threading.local()  # `print` writes a line and its end apart

    def write(self, text: str) -> int:
        begun = self._of_thread.begun = getattr(self._of_thread, "begun", "") + text
        traceback = _TRACEBACK in begun
        if begun.endswith("\n") or ("\n" in text and not traceback):
            *lines, self._of_thread.begun = begun.split("\n")
            for line in ["\n".join(lines)] if traceback else lines:
                if line.strip():
                    self.below.write(self._one(line) + "\n")
            self.below.flush()
        return len(text)

    def _one(self, line: str) -> str:
        if shown := _SHOWN_BY_RAY.fullmatch(line):
            line = shown["line"]
        if _MARK_OF_RAY.match(line) or _is_object(line):
            return line
        return json_line(self._speaker, "INFO", line, time.time())

    def flush(self) -> None:
        self.below.flush()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False  # no colours, no progress bars

    def fileno(self) -> int:
        return int(self.below.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self.below.encoding)

    @property
    def buffer(self) -> Any:
        """What lies below writes as it is: bytes, and children of this process."""
        return self.below.buffer


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False

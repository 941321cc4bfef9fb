"""Lines of logs: who speaks, as text and as JSON; what libraries print; secrets."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from deepgen.monitoring.log_lines import HumanFormatter, JsonFormatter, JsonLines, Speaker, set_up_logs

ROLLOUT = Speaker("rollout", "rollout-3", run="tiny")
NODE = socket.gethostname()
ROOT = Path(__file__).resolve().parents[2]


def record(message: str, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("actors.x", logging.WARNING, __file__, 1, message, (), info)


def objects(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("speaker", "start"),
    [
        (ROLLOUT, f"rollout-3 on {NODE}: "),
        (Speaker("learner", rank=1), f"learner 1 on {NODE}: "),
        (Speaker("stream"), f"stream on {NODE}: "),
        (Speaker("driver"), ""),
    ],
)
def test_a_line_for_people_begins_with_who_speaks_and_where(speaker: Speaker, start: str) -> None:
    said = HumanFormatter(speaker).format(record("cannot reach http://me:hunter2@host/"))
    assert said == start + "cannot reach http://me:***@host/"


def test_a_json_line_names_role_rank_node_and_run_and_holds_a_traceback() -> None:
    said_by_a_library = "bad\napi_key=hunter2"
    try:
        raise ValueError(said_by_a_library)
    except ValueError as error:
        line = JsonFormatter(Speaker("learner", rank=2, run="tiny")).format(record("图\nBearer hunter2hunter2", error))
    said = json.loads(line)
    assert "\n" not in line and "hunter2" not in line and "图" in line
    assert (said["role"], said["name"], said["rank"], said["node"]) == ("learner", "learner 2", 2, NODE)
    assert (said["run"], said["level"], said["logger"]) == ("tiny", "WARNING", "actors.x")
    assert said["error"].startswith("Traceback (most recent call last)") and "ValueError: bad" in said["error"]
    assert said["time"].endswith("Z") and len(said["time"]) == len("2026-11-26T20:03:08.120Z")


def test_what_is_printed_becomes_json_line_by_line() -> None:
    below = io.StringIO()
    stream = JsonLines(below, ROLLOUT)
    print("one", "two", file=stream)
    stream.write("three\n\nfo")
    stream.write("ur\n")
    print("Traceback (most recent call last):\n  File x\nValueError: token=hunter2", file=stream)
    assert [entry["message"] for entry in objects(below)] == [
        "one two",
        "three",
        "four",
        "Traceback (most recent call last):\n  File x\nValueError: token=***",
    ]
    assert {entry["name"] for entry in objects(below)} == {"rollout-3"}


def test_threads_do_not_mix_their_lines() -> None:
    below = io.StringIO()
    stream = JsonLines(below, ROLLOUT)
    stream.write("one ")
    other = threading.Thread(target=lambda: print("two", file=stream))
    other.start()
    other.join()
    stream.write("line\n")
    assert [entry["message"] for entry in objects(below)] == ["two", "one line"]


@pytest.mark.processes
def test_what_a_program_only_shows_is_no_log() -> None:
    command = [sys.executable, "stages/rl.py", "--recipe", "tiny-rl", "--print-config"]
    shown = subprocess.check_output(command, text=True, env={**os.environ, "DEEPGEN_LOG": "json"}, cwd=ROOT, timeout=60)
    assert "steps: 26" in shown and not shown.startswith("{")


def test_lines_of_workers_and_marks_of_ray_stay_as_they_are() -> None:
    below = io.StringIO()
    stream = JsonLines(below, Speaker("driver"))
    line = JsonFormatter(ROLLOUT).format(record("moved"))
    print(line, file=stream)
    print(f"\x1b[36m(RolloutActor pid=7, ip=10.0.0.1)\x1b[0m {line}", file=stream)
    print(f"(RolloutActor pid=7) {line}", file=stream)
    print(":actor_name:RolloutActor", file=stream)
    print("{not json", file=stream)
    *same, mark, other = below.getvalue().splitlines()
    assert same == [line] * 3 and mark == ":actor_name:RolloutActor" and json.loads(other)["message"] == "{not json"


PROGRAM = """
import logging, sys
from deepgen.errors import run_program
def main():
    print("to stdout")
    logging.getLogger("x").warning("to the log")
    raise {error}
run_program(main)
"""


def run(error: str, **environment: str) -> tuple[list[str], list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(error=error)],
        env={**os.environ, "PYTHONPATH": "platform", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode in (1, 2)
    return done.stdout.splitlines(), done.stderr.splitlines()


@pytest.mark.processes
def test_a_program_speaks_to_people_unless_json_is_asked_for() -> None:
    error = "ValueError('token=hunter2')"
    stdout, stderr = run(error)
    assert stdout == ["to stdout"] and stderr[0] == "to the log" and stderr[-1] == "ValueError: token=***"
    stdout, stderr = run(error, DEEPGEN_LOG="json")
    said = [json.loads(line) for line in (*stdout, *stderr)]
    assert [entry["message"].splitlines()[-1] for entry in said] == ["to stdout", "to the log", "ValueError: token=***"]
    assert {entry["role"] for entry in said} == {"driver"} and [e["level"] for e in said[:2]] == ["INFO", "WARNING"]


def test_each_line_is_on_the_console_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray Train gives its workers a handler of its own, which prints the message alone."""
    from ray._private.log import PlainRayHandler

    root, file = logging.getLogger(), logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(root, "handlers", [file, PlainRayHandler(), logging.StreamHandler(sys.stdout)])
    set_up_logs(ROLLOUT)
    set_up_logs(Speaker("learner", rank=0))
    assert len(root.handlers) == 2 and root.handlers[0] is file
    logging.getLogger("actors.x").warning("moved")
    logging.getLogger("actors.x").info("quiet")
    assert capsys.readouterr() == ("", f"learner 0 on {NODE}: moved\n")

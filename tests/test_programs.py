"""What every program does around its work: how it stops, what it prints, and whether that is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.learner.console import console, shown
from deepgen.config import stage_command

STOPPED = """import json, os, sys
from deepgen.config import run_program
def main():
    if "--resume" in sys.argv:
        sys.exit(print(json.dumps([sys.executable, sys.argv])))
    {}
run_program(main)
"""
AS_RAY_DOES = """try:
        os.kill(os.getpid(), 15)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None"""  # it drops what a handler of signals has raised


@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "code"),
    [("raise KeyboardInterrupt", 130), ("os.kill(os.getpid(), 15)", 143), (AS_RAY_DOES, 143)],
    ids=["ctrl-c", "sigterm", "sigterm while Ray waits"],
)
def test_the_line_to_continue_can_be_pasted(tmp_path: Path, how: str, code: int) -> None:
    """Into a shell in another folder, without the environment on its PATH: the same interpreter, program, settings."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    (folder / "program.py").write_text(STOPPED.format(how))
    given = ["run.name=it's", "rewards.weights.text={ocr: 1.0, clip: 0.5}", "data.prompts=a b/*.txt"]
    command = [sys.executable, "program.py", *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, timeout=60)
    assert done.returncode == code
    said, _, line = done.stderr.strip().partition(": ")
    assert said == "stopped; to continue"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.environ["PYTHONPATH"]}
    again = subprocess.run(
        line, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True, timeout=60
    )
    assert json.loads(again.stdout) == [sys.executable, [str(folder / "program.py"), *given, "--resume"]]


@pytest.mark.processes
def test_the_line_to_continue_hides_passwords(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(STOPPED.format("raise KeyboardInterrupt"))
    command = [sys.executable, str(tmp_path / "program.py"), "tracking.uri=https://me:hunter2@host/"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.endswith("program.py tracking.uri=https://me:***@host/ --resume\n")
    assert "hunter2" not in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("option", ["--train-only=x", "--rollout-only", "--plan"])
def test_what_cannot_be_continued_has_no_such_line(tmp_path: Path, option: str) -> None:
    (tmp_path / "program.py").write_text(STOPPED.format("raise KeyboardInterrupt"))
    command = [sys.executable, str(tmp_path / "program.py"), option, "1"]
    assert subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stderr == "\nstopped\n"


def test_in_a_submitted_job_the_line_is_the_one_to_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepgen.errors.SUBMITTED_COPY", True)
    monkeypatch.setattr("deepgen.config.cli.SUBMITTED_COPY", True)
    assert stage_command("rl", "run.name=a b") == "python stages/rl.py 'run.name=a b'"


@pytest.mark.processes
def test_who_reads_the_output_may_stop_reading(tmp_path: Path) -> None:
    """As `| head` does after it has its lines: the program works on to its end, and no write fails."""
    (tmp_path / "program.py").write_text(
        "from deepgen.config import run_program\n"
        "def main():\n"
        "    for i in range(100_000):\n"
        "        print('line', i)\n"
        f"    open({str(tmp_path / 'end')!r}, 'w').close()\n"
        "run_program(main)\n"
    )
    reading, writing = os.pipe()
    command = [sys.executable, str(tmp_path / "program.py")]
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        assert os.read(reading, 7) == b"line 0\n"
        os.close(reading)
        assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 0
    assert (tmp_path / "end").exists()


def test_a_run_says_where_its_lines_are_when_nobody_reads_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("actors.learner.console.output_lost", lambda: True)
    with shown(tmp_path):
        console(tmp_path)("a line")
    assert f"the run goes on, its lines are in {tmp_path / 'console.log'}" in capsys.readouterr().err
    assert (tmp_path / "console.log").read_text() == "a line\n"


@pytest.mark.processes
@pytest.mark.parametrize(
    "locale", [{"LANG": "C"}, {"LC_ALL": "POSIX"}, {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}]
)
def test_letters_that_a_console_cannot_show_are_no_error(tmp_path: Path, locale: dict[str, str]) -> None:
    text = "步 “é” \udcff"
    (tmp_path / "program.py").write_text(
        "from deepgen.config import UserError, run_program\n"
        "def main():\n"
        f"    print({text!a})\n"
        f"    raise UserError({text!a})\n"
        "run_program(main)\n"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ["PYTHONPATH"]} | locale
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=60)
    shown = {text.encode("ascii", "backslashreplace"), text.encode("utf-8", "backslashreplace")}
    assert done.returncode == 2
    assert done.stdout.rstrip(b"\n") in shown
    assert done.stderr.removeprefix(b"error: ").rstrip(b"\n") in shown


@pytest.mark.processes
def test_streams_that_the_caller_has_closed_lead_nowhere(tmp_path: Path) -> None:
    """Otherwise the next file gets the number of one, and what children print lands in it."""
    code = "import os, subprocess; from deepgen.errors import run_program\ndef main():\n"
    code += " with open('data', 'w') as f:\n  f.write('kept'); f.flush(); print('lost')\n"
    code += "  subprocess.run(['sh', '-c', 'echo lost; echo lost >&2'], check=True)\nrun_program(main)"
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    done = subprocess.run(closed, cwd=tmp_path, check=False, timeout=60)
    assert (done.returncode, (tmp_path / "data").read_text()) == (0, "kept")

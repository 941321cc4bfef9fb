"""A full or read-only disk, for real: one line, all ranks end, what was complete stays, and there is a way to go on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actors.learner.console import console
from actors.learner.preflight import prepare_run
from actors.learner.run_control import run_lock
from actors.learner.worker import _full_disk_is_final
from deepgen.config import UserError, load_settings
from deepgen.errors import disk_error
from tests.helpers.learner_workers import run_workers
from tests.helpers.small_disk import fill, read_only, small_disk
from tests.helpers.toy import start, toy_result, toy_run

pytestmark = pytest.mark.processes


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 24) as folder:  # a checkpoint wants 16 MiB beside itself
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 0)])
def test_full_between_the_last_checkpoint_and_the_result(tmp_path: Path, disk: Path, world: int, stage: int) -> None:
    """With room, --resume writes the result from the checkpoint, with the bits of an undisturbed run."""
    options = (f"train.workers={world}", f"train.zero_stage={stage}", "train.ema_decay=0.9")
    whole = toy_run(tmp_path / "whole", "a", *options)
    run = toy_run(disk, "a", *options, fill=(str(disk), "result"), ends=str(tmp_path))
    run_workers(tmp_path, [whole, run], world=world)
    said = {(tmp_path / f"a.{rank}.error").read_text() for rank in range(world)}
    (line,) = said  # all ranks say the same
    assert line.startswith(f"run.dir: cannot write the result to {disk / 'a' / 'model'}: ")
    assert "No space left on device" in line and "make room, then continue with --resume" in line
    assert not (disk / "a" / "model").exists() and not list((disk / "a").glob(".model*"))
    assert sorted(p.name for p in (disk / "a" / "checkpoints").iterdir())[-1] == "step-000006"
    (disk / "filler").unlink()
    again = toy_run(disk, "a", *options, "run.resume=true")
    run_workers(tmp_path, [again], world=world)
    for part in ("model", "model-ema"):
        expected, result = toy_result(tmp_path / "whole", "a", part), toy_result(disk, "a", part)
        assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_full_while_a_checkpoint_is_written(tmp_path: Path, disk: Path) -> None:
    """The one before stays. The error comes up when the next one is due, on both ranks."""
    two = ("train.workers=2", "train.zero_stage=1")
    run_workers(tmp_path, [toy_run(disk, "a", *two, "train.steps=2")], world=2)
    again = toy_run(disk, "a", *two, "run.resume=true", fill=(str(disk), "shard"))
    output = run_workers(tmp_path, [again], world=2, exit_code=1)
    lines = [line for line in output.splitlines() if line.startswith("deepgen.errors.UserError: ")]
    assert len(lines) == 2
    assert all(f"cannot write the checkpoint of step 4 to {disk / 'a' / 'checkpoints'}: " in line for line in lines)
    assert all(line.endswith("; make room, then continue with --resume") for line in lines)
    assert sorted(p.name for p in (disk / "a" / "checkpoints").glob("step-*")) == ["step-000002"]


def test_no_room_at_the_start(tmp_path: Path, disk: Path) -> None:
    settings = load_settings(None, [f"run.dir={disk}", "run.name=a"])
    fill(disk)
    with pytest.raises(UserError) as caught, run_lock(settings):
        pass
    assert str(caught.value).startswith(f"run.dir: cannot write who has the run to {disk / '.a.lock'}: No space left")


def test_a_read_only_folder_is_the_same(tmp_path: Path, disk: Path) -> None:
    settings = start(tmp_path, f"run.dir={disk}")
    read_only(disk)
    with pytest.raises(UserError, match=r"run\.dir: cannot write the run folder .*: Read-only file system"):
        prepare_run(settings, "rl")
    with pytest.raises(UserError, match=r"run\.dir: cannot write the run folder .*: Read-only file system"):
        run_lock(settings).__enter__()


def test_a_full_disk_is_final_wherever_it_is_met(tmp_path: Path) -> None:
    """Not tried three times. A connection that broke, also an OSError, is no such thing."""
    settings = load_settings(None, [f"run.dir={tmp_path}", "run.name=a"])
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        error = OSError(number, os.strerror(number))
        with pytest.raises(UserError) as caught, _full_disk_is_final(settings):
            raise error
        assert str(caught.value) == (
            f"run.dir: cannot write the run to {tmp_path / 'a'}: {os.strerror(number)}; make room or let it be "
            "written, then continue with --resume"
        )
        remote = OSError("ray::RolloutActor ...\nlong story")
        remote.cause = error  # type: ignore[attr-defined]  # as Ray's exceptions do
        assert disk_error(remote) is error
    with pytest.raises(ConnectionResetError), _full_disk_is_final(settings):
        raise ConnectionResetError(errno.ECONNRESET, "reset by peer")


def test_the_console_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say = console(tmp_path)
    (tmp_path / "console.log").symlink_to("/dev/full")
    say("step 1/2")
    assert capsys.readouterr().err == f"cannot write {tmp_path / 'console.log'}: No space left on device: step 1/2\n"


def test_a_program_ends_with_one_line(tmp_path: Path) -> None:
    code = "from deepgen.config import run_program\n"
    code += "def main(): print('x', file=open('/dev/full', 'w'), flush=True)\nrun_program(main)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: cannot write a file: No space left on device; make room"]

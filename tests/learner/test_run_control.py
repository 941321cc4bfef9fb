"""One process a run, whatever becomes of it; and a run that is asked to stop ends its step with a checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.learner.run_control import STOP, lock_file, run_lock, stop_requested, stops_after_a_step
from deepgen.config import Settings, UserError, load_settings
from deepgen.errors import Terminated
from tests.helpers.learner_workers import run_workers
from tests.helpers.toy import STEPS, toy_result, toy_run

HOLD = """
import json, sys, time
from actors.learner.run_control import run_lock
from deepgen.config import load_settings
with run_lock(load_settings(None, json.loads(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def overrides(folder: Path, name: str = "a") -> list[str]:
    return [f"run.dir={folder / 'runs'}", f"run.name={name}"]


def settings_of(folder: Path, name: str = "a") -> Settings:
    return load_settings(None, overrides(folder, name))


def test_the_second_is_refused_and_told_about_the_first(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with run_lock(settings):
        first = lock_file(settings).read_text()
        said = rf"run\.name: 'a' in .*runs is running already, process {os.getpid()} on "
        with pytest.raises(UserError, match=said), run_lock(settings):
            pytest.fail("two processes have one run")
        assert lock_file(settings).read_text() == first
        with run_lock(settings_of(tmp_path, "b")):  # another run beside it
            pass
    with run_lock(settings):  # again, once it has ended
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"run\.dir: cannot write the run folder"), run_lock(settings_of(tmp_path)):
        pytest.fail("locked in a file")


@pytest.mark.processes
def test_a_killed_process_has_left_the_run(root: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, json.dumps(overrides(tmp_path))], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} "), run_lock(settings_of(tmp_path)):
        pytest.fail("two processes have one run")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with run_lock(settings_of(tmp_path)):
        assert re.match(rf"process {os.getpid()} on \S+ since ", lock_file(settings_of(tmp_path)).read_text())


# -- stopping --------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard() -> Iterator[None]:
    """SIGHUP counts, also if the tests run under nohup, which a run respects."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard")
def test_the_first_signal_asks_and_the_second_ends(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    settings.run.folder.mkdir(parents=True)
    (settings.run.folder / STOP).touch()  # of an earlier start
    before = signal.getsignal(signal.SIGTERM)

    def two_signals() -> None:
        with stops_after_a_step(settings):
            assert not stop_requested(settings.run.folder)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_requested(settings.run.folder)
            os.kill(os.getpid(), signal.SIGHUP)
            pytest.fail("the second signal did nothing")

    with pytest.raises(Terminated):
        two_signals()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("heard")
def test_a_learner_that_stopped_is_no_finished_run(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    settings.run.folder.mkdir(parents=True)
    with pytest.raises(Terminated), stops_after_a_step(settings):
        os.kill(os.getpid(), signal.SIGHUP)  # the learner then returns as if it had finished
    with stops_after_a_step(settings):
        pass


@pytest.mark.processes
def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """On two workers: asked before its first step is over, it writes that step's checkpoint, which was not due."""
    every = "train.checkpoint_every=100"
    whole, asked = toy_run(tmp_path, "whole", every), toy_run(tmp_path, "asked", every)
    folder = tmp_path / "asked"
    folder.mkdir()
    (folder / STOP).touch()
    run_workers(tmp_path, [whole, asked], world=2)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]
    assert not (folder / "model").exists()
    (folder / STOP).unlink()
    output = run_workers(tmp_path, [asked | {"overrides": [*asked["overrides"], "run.resume=true"]}], world=2)
    assert f"resuming after step 1 of {STEPS}" in output
    expected = toy_result(tmp_path, "whole")
    assert all(bool((value == expected[key]).all()) for key, value in toy_result(tmp_path, "asked").items())

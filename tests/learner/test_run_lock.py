"""One process a run: who comes second is told who has it, and a process that dies leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from actors.learner.run_lock import lock_file, run_lock
from deepgen.config import Settings, UserError, load_settings

HOLD = """
import json, sys, time
from actors.learner.run_lock import run_lock
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

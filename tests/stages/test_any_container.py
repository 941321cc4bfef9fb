"""`stages/rl.py` as another user: without a home, a name, a terminal, or anything to write to but a run folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.rl_world import make_world, overrides

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
USER = 54321  # an id that no user of this machine has
# Another user who may write nothing of ours. He may read everything, because a checkout and a Python below /root are
# usual where tests run, and closed to others.
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
AS_USER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder of that user, with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="u", dir="/tmp"))
    os.chown(folder, USER, USER)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def world(tmp_path: Path, empty_database: Path) -> Path:
    """A narrow model and records that nobody may write to, and a run folder of that user's, below a space."""
    folder = tmp_path / "a world"
    folder.mkdir()
    make_world(folder)
    (folder / "runs").mkdir()
    shutil.copy(empty_database, folder / "runs" / "mlflow.db")
    for path in (folder / "runs", folder / "runs" / "mlflow.db"):
        os.chown(path, USER, USER)
    return folder


def test_a_user_without_a_home_runs_it(world: Path, temporary: Path) -> None:
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("only root with setpriv (util-linux) can run a program as another user")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{unused.getsockname()[1]}"
        environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TMPDIR": str(temporary), "LC_ALL": "C"}
        environment |= {"http_proxy": proxy, "https_proxy": proxy, "all_proxy": proxy, "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"RAY_worker_niceness": "0"}  # not 15: it would starve beside the other tests
        settings = overrides(world, "run.name=it", "train.steps=1", "train.checkpoint_every=1")
        settings += ["evaluation.prompts=0", "algorithm.sft_coef=0", "data.cache_dir=", "rollout.actors=1"]
        settings += [f"rewards.weights.{task}={{ocr: 1.0}}" for task in ("t2i", "text")]
        command = [*AS_USER, sys.executable, str(ROOT / "stages" / "rl.py"), *settings]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd="/"
        )
        hosts = set()
        while process.poll() is None:
            hosts |= listening(process.pid)
            time.sleep(3)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    run = world / "runs" / "it"
    assert (run / "model" / "transformer").is_dir()
    assert (run / "model").stat().st_uid == USER
    assert hosts == {"127.0.0.1"}
    assert [path.name for path in temporary.iterdir()] == [f"deepgen-{USER}"]
    assert (temporary / f"deepgen-{USER}").stat().st_mode & 0o777 == 0o700
    assert "Traceback" not in output


def listening(process: int) -> set[str]:
    """Addresses that a process and those below it listen on."""
    found = set()
    with suppress(psutil.Error):
        for one in [psutil.Process(process), *psutil.Process(process).children(recursive=True)]:
            with suppress(psutil.Error):
                connections = [c for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                found |= {connection.laddr.ip.removeprefix("::ffff:") for connection in connections}
    return found

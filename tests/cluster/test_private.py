"""A private cluster: who can reach it and its files, what it needs of the machine, and what it removes."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.accelerators import NvidiaGPUAcceleratorManager

from deepgen.cluster import private
from deepgen.cluster.private import environment, own_session, usable_cpus, usable_gpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_held", [])


def test_sessions_of_live_processes_stay_and_those_of_dead_ones_go(tmp_path: Path) -> None:
    first = own_session(tmp_path)
    (first / "session_x").mkdir()
    (first / "session_latest").symlink_to(first / "session_x")
    outside = tmp_path / "home"
    outside.mkdir()
    (outside / "kept").touch()
    (first / "link").symlink_to(outside)
    (tmp_path / "s12345").mkdir()  # no name of ours
    (tmp_path / "sbeef").symlink_to(outside)
    second = own_session(tmp_path)
    assert first.is_dir() and second.is_dir() and first != second
    assert stat.S_IMODE(second.stat().st_mode) == 0o700

    os.close(private._held.pop(0))  # as if the process of the first had died
    third = own_session(tmp_path)
    assert not first.exists() and second.is_dir() and third.is_dir()
    assert (outside / "kept").exists() and (tmp_path / "s12345").is_dir()
    for descriptor in private._held:
        os.close(descriptor)


def test_a_session_that_another_start_is_just_removing_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "_sessions", lambda folder: [folder / "s0000"])
    assert own_session(tmp_path).is_dir()
    os.close(private._held[0])


@pytest.mark.parametrize(("torch", "expected"), [("2.13.0+cpu", 0), ("2.13.0", None), ("2.13.0+cu130", None)])
def test_a_torch_for_cpus_leaves_the_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], torch: str, expected: int | None
) -> None:
    monkeypatch.setattr(private, "version", lambda package: {"torch": torch}[package])
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", lambda: 1)
    assert usable_gpus() == expected
    assert ("not using 1 GPU(s): torch is built for CPUs here" in capsys.readouterr().out) == (expected == 0)


@pytest.mark.processes
def test_a_killed_process_lets_go_of_its_session(tmp_path: Path) -> None:
    code = "import time; from pathlib import Path; from deepgen.cluster.private import own_session\n"
    code += f"print(own_session(Path({str(tmp_path)!r})), flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        theirs = Path(holder.stdout.readline().strip())
        own_session(tmp_path)
        assert theirs.is_dir()
        holder.kill()
        holder.wait()
    own_session(tmp_path)
    assert not theirs.exists()
    for descriptor in private._held:
        os.close(descriptor)


@pytest.mark.parametrize(("quota", "cpus"), [(0.5, 1), (0.01, 1), (1.5, 1), (None, None), (10_000.0, None)])
def test_less_than_one_cpu_is_one(monkeypatch: pytest.MonkeyPatch, quota: float | None, cpus: int | None) -> None:
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: quota)
    assert usable_cpus() == (cpus or len(os.sched_getaffinity(0)))


def test_nothing_is_compiled_against_headers_below_a_space() -> None:
    assert environment("/home/me/my checkout/.venv")["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in environment("/home/me/checkout/.venv")


PROBE = """
import json, os, pathlib, psutil, ray
from deepgen.cluster.connect import connect
from deepgen.config import load_settings
os.chdir("/")
connect(load_settings(None, ["train.workers=1"]), code_root=pathlib.Path({root!r}))
@ray.remote(num_cpus=0.1)
class Probe:
    def look(self):
        import actors, deepgen, getpass, platform
        names = ("RAY_AUTH_MODE", "HOME", "no_proxy", "TMPDIR")
        environment = {{name: os.environ.get(name) for name in names}}
        return {{"user": getpass.getuser(), "files": [actors.__file__, deepgen.__file__], **environment}}
probe = Probe.remote()
found = ray.get(probe.look.remote())
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
listening = [(p.name(), c.laddr.ip) for p in processes for c in p.net_connections("inet") if c.status == "LISTEN"]
session = pathlib.Path(ray._private.worker._global_node.get_session_dir_path())
modes = [oct(path.stat().st_mode & 0o777) for path in (session, session.parent, session.parent.parent)]
cpus = ray.cluster_resources()["CPU"]
print(json.dumps(found | {{"listening": listening, "modes": modes, "session": str(session), "cpus": cpus}}))
"""


@pytest.mark.ray
def test_a_private_cluster_is_private_and_needs_nothing(tmp_path: Path) -> None:
    """No home, no user name, no token, a proxy that is not there, a C locale, no PYTHONPATH for the workers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{unused.getsockname()[1]}"
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "RAY_TMPDIR": os.environ["RAY_TMPDIR"]}
        environment |= {"HOME": "/dev/null", "LC_ALL": "POSIX", "http_proxy": proxy, "HTTPS_PROXY": proxy}
        command = [sys.executable, "-c", PROBE.format(root=str(ROOT))]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    base = Path(os.environ["RAY_TMPDIR"]) / f"deepgen-{os.geteuid()}"
    assert found["RAY_AUTH_MODE"] == "token"
    assert all(Path(file).is_relative_to(ROOT) for file in found["files"])
    assert found["HOME"] == str(base / "home") and not (base / "home" / ".ray").exists()
    assert found["no_proxy"] == "localhost,127.0.0.1,::1"
    assert len(found["listening"]) > 4  # raylet, head, driver, workers
    assert {ip.removeprefix("::ffff:") for _, ip in found["listening"]} == {"127.0.0.1"}
    assert Path(found["TMPDIR"]) == Path(found["session"]).parent / "tmp"
    assert found["modes"] == ["0o700"] * 3
    assert Path(found["session"]).is_relative_to(base)
    assert found["cpus"] == usable_cpus()

"""`ray job submit --working-dir <copy>` runs the submitted copy, although another copy is installed.

The job is a small stage program in a changed copy of the checkout. It runs on a separate cluster (own ports, temporary
folder and token), which the test starts with `ray start --head`, as a user would.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

PACKAGES = ("deepgen", "actors", "rewards", "stages")
SOURCES = ("platform", "actors", "rewards", "stages", "deepgen.py", "pyproject.toml", "LICENSE", "README.md")
MARK = "COPY_MARK"
START_SECONDS, JOB_SECONDS = 120, 180
RAY = str(Path(sys.executable).parent / "ray")

PROBE = f'''
"""Tells which copy of each package the driver and a worker import."""
import importlib, json, ray

def look():
    import platform
    found = {{"platform": platform.__file__, "python": platform.python_version()}}
    for name in {PACKAGES!r}:
        module = importlib.import_module(name)
        found[name] = [module.__file__, getattr(module, "{MARK}", None)]
    import deepgen.config.recipes
    found["deepgen.config.recipes"] = [deepgen.config.recipes.__file__, None]
    return found

ray.init(log_to_driver=False)
worker = ray.get(ray.remote(look).remote(), timeout={JOB_SECONDS})
print("PROBE", json.dumps({{"driver": look(), "worker": worker}}))
'''


@dataclass(frozen=True)
class Submission:
    """The report of a submitted job: `places[process][module]` is [file, mark], or only the file for `platform`."""

    copy: Path
    places: dict[str, dict[str, Any]]


def copy_of_checkout(root: Path, target: Path, mark: str) -> Path:
    """A copy of the sources in which every package defines `COPY_MARK = mark`."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignore)
        elif source.is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    for name in PACKAGES:
        init = target / ("platform/deepgen" if name == "deepgen" else name) / "__init__.py"
        init.write_text(f"{init.read_text()}\n{MARK} = {mark!r}\n")
    return target


def free_ports(count: int) -> list[int]:
    """Different ports on which no process listens now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a process listens on `port`. Fails with the log if `process` ends or time is up."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"the cluster did not open port {port}:\n{log.read_text()[-3000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children, and no other process."""
    if process.poll() is not None:
        return
    head = psutil.Process(process.pid)
    family = [head, *head.children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for one in alive:
        one.kill()
    process.wait(timeout=20)


@pytest.fixture(scope="module")
def installed_copy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with another copy of the project, installed from its wheel."""
    source = copy_of_checkout(root, tmp_path_factory.mktemp("other") / "checkout", "installed")
    (source / "README.md").touch()
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder), str(source)], check=True, timeout=120, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def dashboard(installed_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Dashboard address of a cluster whose environment has the other copy installed."""
    gcs, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    ports = {
        "port": gcs,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc,
        "metrics-export-port": metrics,
        "num-cpus": 2,
        "object-store-memory": 100 * 2**20,
    }
    command = [RAY, "start", "--head", "--block", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    command += [f"--{name}={value}" for name, value in ports.items()]
    folder = tmp_path_factory.mktemp("cluster")
    log = folder / "log"
    # PYTHONPATH comes after a job's working directory and before site-packages, like an installed copy.
    environment = os.environ | {"PYTHONPATH": str(installed_copy)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        wait_for(dashboard, process, log)
        wait_for(agent, process, log)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        end(process)


@pytest.fixture(scope="module")
def submission(root: Path, dashboard: str, tmp_path_factory: pytest.TempPathFactory) -> Submission:
    """The probe, submitted with a changed copy. The working directory is the only flag."""
    copy = copy_of_checkout(root, tmp_path_factory.mktemp("submitted") / "checkout", "submitted")
    (copy / "stages" / "probe.py").write_text(PROBE)
    command = [RAY, "job", "submit", f"--address={dashboard}", "--working-dir=.", "--", "python", "stages/probe.py"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=JOB_SECONDS, cwd=copy, env=environment, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("PROBE ")]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(lines) == 1, done.stdout[-3000:]
    return Submission(copy, json.loads(lines[0].removeprefix("PROBE ")))


@pytest.mark.ray
@pytest.mark.parametrize("process", ["driver", "worker"])
@pytest.mark.parametrize("name", PACKAGES)
def test_submitted_copy_is_imported(submission: Submission, process: str, name: str) -> None:
    file, mark = submission.places[process][name]
    assert mark == "submitted", f"{process} imported {name} from {file}"
    assert "_ray_pkg_" in file  # the folder into which Ray unpacked the submission


@pytest.mark.ray
@pytest.mark.parametrize("process", ["driver", "worker"])
def test_submodules_come_from_the_submitted_copy(submission: Submission, process: str) -> None:
    places = submission.places[process]
    package, submodule = Path(places["deepgen"][0]).parent, Path(places["deepgen.config.recipes"][0])
    assert submodule == package / "config" / "recipes.py"


@pytest.mark.ray
@pytest.mark.parametrize("process", ["driver", "worker"])
def test_platform_is_the_standard_library(submission: Submission, process: str) -> None:
    assert submission.places[process]["platform"] == getattr(__import__("platform"), "__file__", None)
    assert submission.places[process]["python"] == sys.version.split()[0]


@pytest.mark.processes
def test_installed_copy_is_another_one(installed_copy: Path) -> None:
    """The test above would prove nothing if the installed copy could not be imported."""
    code = f"import deepgen, deepgen.errors, actors; print(deepgen.{MARK}, actors.{MARK}, deepgen.__file__)"
    environment = os.environ | {"PYTHONPATH": str(installed_copy)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=installed_copy, env=environment
    )
    assert done.stdout.split() == ["installed", "installed", str(installed_copy / "deepgen" / "__init__.py")]


def test_platform_folder_is_no_package(root: Path) -> None:
    """With an __init__.py, every Ray worker of a submission would import it instead of the standard module."""
    assert (root / "platform" / "deepgen" / "__init__.py").is_file()
    assert not (root / "platform" / "__init__.py").exists()


def test_runtime_environment_keeps_what_workers_need(root: Path) -> None:
    environment = yaml.safe_load((root / "clusters" / "runtime_env.yaml").read_text())
    assert set(environment) == {"excludes", "env_vars"}
    assert {".git", ".venv", "runs"} <= set(environment["excludes"])
    assert not {"assets", "platform", "actors", "rewards", "stages", "deepgen.py"} & set(environment["excludes"])

"""Fixtures for all tests, and the environment of every process in a test run.

Importing this file sets the environment before any test module can import ray or torch. Ray reads its authentication
settings only once, and its processes inherit the other variables.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from cpu_stack_hook import build_of

from deepgen.monitoring.variables import COMMIT, LOG, METRICS, SUBMISSION
from tests.helpers.process_guard import GUARD

ROOT = Path(__file__).resolve().parent.parent
# Ray puts its sockets under RAY_TMPDIR, and the path of a Unix socket has at most 107 characters.
RAY_TMPDIR = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))


def _torch_is_cpu_build() -> bool:
    spec = importlib.util.find_spec("torch")
    return spec is not None and spec.origin is not None and build_of("torch", Path(spec.origin).parent.parent) == "cpu"


def _set_environment() -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)  # tests must not join a real cluster or write to a real server
    for name in (COMMIT, LOG, METRICS, SUBMISSION):
        os.environ.pop(name, None)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": str(RAY_TMPDIR),
        # Token authentication stays on, with a token for this run only, so nothing is written to the home folder.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # not 15: they would starve beside the other tests
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        # torch looks for ninja on the PATH. The checkout comes before any installed copy of the packages.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": str(ROOT),
    }
    if _torch_is_cpu_build():
        os.environ["DS_ACCELERATOR"] = "cpu"


_set_environment()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with GUARD.watching(_marks(item)):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with GUARD.watching(_marks(item)):
        return (yield)


def _marks(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, then those that share a cluster. A worker that ends early takes a quick file.

    The slowest are those that may take longest.
    """
    slow = Counter(item.path for item in items if "slow" in _marks(item))
    longest = Counter[Path]()
    for item in items:
        if mark := item.get_closest_marker("timeout"):
            longest[item.path] = max(longest[item.path], mark.args[0])
    clusters = {item.path for item in items if "ray" in _marks(item)}
    items.sort(key=lambda item: (-longest[item.path], -slow[item.path], item.path not in clusters))


def pytest_sessionfinish() -> None:
    """End the cluster of `ray_local` and remove Ray's session folders."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    shutil.rmtree(RAY_TMPDIR, ignore_errors=True)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True)
def _lines_of_logs_stay() -> Iterator[None]:
    """What an actor's class says of its lines, where a test makes one in this process, ends with the test."""
    yield
    root = logging.getLogger()
    for handler in [one for one in root.handlers if type(one).__name__ == "_ToStderr"]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and no runs. Creating it takes seconds, so tests copy it."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def ray_local() -> Iterator[ModuleType]:
    """Ray with a cluster for this test process (4 logical CPUs). After a module, waits until all resources are free."""
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=256 * 2**20,
            log_to_driver=False,
        )
    yield ray
    deadline = time.monotonic() + 5
    while ray.available_resources().get("CPU") != 4:
        if time.monotonic() > deadline:  # an actor was left behind
            ray.shutdown()
            return
        time.sleep(0.05)

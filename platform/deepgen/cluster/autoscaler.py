"""Asks Ray's autoscaler (v2) whether it can provide what a run needs, and what it is doing about that.

The autoscaler knows the kinds of nodes, their labels and limits; Ray passes none of this on to programs. But it takes a
request for the whole cluster, packs it node by node, and says whether it can be met. It then starts all nodes at once,
instead of those of each role when their turn comes. The request is withdrawn when it is answered: actors that wait for
their place ask for the same, and nobody has to pay for nodes of a program that was killed.

A cluster has room for one such request, and Ray's own coordinator of Train and Data, where it runs, writes it anew
every 20 s. So a program knows its own by a mark in it, waits while there is another one, and asks again when its own
is gone.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from deepgen.cluster.resources import Need
from deepgen.errors import UserError

ANSWER_DEADLINE_S = 120.0  # it looks every 5 s, may be busy with a cloud's interface, and answers one after the other
PATIENCE_S = 30.0  # after which another's request counts as left behind
_CALL_S = 10.0
_LOOK_S = 0.2


class Autoscaler:
    """The autoscaler of the cluster whose head (GCS) has this address."""

    def __init__(self, address: str) -> None:
        self._address = address

    def runs(self) -> bool:
        """Whether there is one."""
        return bool(self._status().autoscaling_state.autoscaler_state_version)

    def can_provide(self, needs: Sequence[Need]) -> bool:
        """Whether the cluster has all of this, or can grow to it. Nodes that are missing start then.

        Raises UserError if there is no answer within ANSWER_DEADLINE_S.
        """
        mark = secrets.randbelow(10**6) * 1e-12  # of a CPU, with which a bundle more does not matter
        marked = {"resources": {"CPU": mark}, "label_selector": {}}
        bundles = [marked, *(bundle for need in needs for bundle in [_bundle(need)] * need.count)]
        begin, seen = time.monotonic(), None
        free = begin + PATIENCE_S
        try:
            while True:
                status, now = self._status(), time.monotonic()
                asked = status.cluster_resource_state.cluster_resource_constraints
                if not _has(asked, mark):
                    if not asked or now > free:
                        self._request(bundles)
                        free = now + PATIENCE_S  # for the one that may take its place
                    seen = None
                elif seen is None:
                    seen = status.cluster_resource_state.cluster_resource_state_version
                elif status.autoscaling_state.last_seen_cluster_resource_state_version >= seen:
                    refused = status.autoscaling_state.infeasible_cluster_resource_constraints
                    if not refused or _has(refused, mark):
                        return not refused
                if now - begin > ANSWER_DEADLINE_S:
                    raise UserError(
                        f"cluster.address: the autoscaler of {self._address} has not said within {ANSWER_DEADLINE_S:g} "
                        "s whether it can provide what the run needs; its log is monitor.log on the head node"
                    )
                time.sleep(_LOOK_S * (0.5 + secrets.randbelow(1000) / 1000))
        finally:
            if _has(self._status().cluster_resource_state.cluster_resource_constraints, mark):
                self._request([])

    def doing(self) -> str:
        """One line about nodes that start, or that could not be started; "" if there are none."""
        state = self._status().autoscaling_state
        coming = Counter({one.ray_node_type_name: one.count for one in state.pending_instance_requests})
        coming.update(one.ray_node_type_name for one in state.pending_instances)
        parts = [f"{count} x {name}" for name, count in sorted(coming.items())]
        line = f"nodes that start: {', '.join(parts)}" if parts else ""
        failed = [f"{one.ray_node_type_name} ({one.reason})" for one in state.failed_instance_requests]
        return "; ".join(filter(None, [line, f"could not be started: {', '.join(failed)}" if failed else ""]))

    def _status(self) -> Any:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
        from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

        reply = GetClusterStatusReply()
        reply.ParseFromString(GcsClient(address=self._address).get_cluster_status(timeout_s=_CALL_S))
        return reply

    def _request(self, bundles: list[dict[str, Any]]) -> None:
        from ray.autoscaler.v2.sdk import request_cluster_resources

        request_cluster_resources(self._address, bundles, timeout=int(_CALL_S))


def running_autoscaler() -> Autoscaler | None:
    """That of the connected cluster. None: it stays as large as it is, or has version 1, which answers nothing."""
    import ray

    found = Autoscaler(ray.get_runtime_context().gcs_address)
    return found if found.runs() else None


def _has(constraints: Any, mark: float) -> bool:
    """Whether one of the constraints on the cluster has the mark."""
    requests = (request for constraint in constraints for request in constraint.resource_requests)
    return any(request.request.resources_bundle.get("CPU") == mark for request in requests)


def _bundle(need: Need) -> dict[str, Any]:
    return {"resources": dict(need.per_process), "label_selector": dict(need.labels)}

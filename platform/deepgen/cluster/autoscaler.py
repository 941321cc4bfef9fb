"""Asks Ray's autoscaler (v2) whether it can provide what a run needs, and what it is doing about that.

The autoscaler knows the kinds of nodes, their labels and limits; Ray passes none of this on to programs. But it takes a
request for the whole cluster, packs it node by node, and says whether it can be met. It then starts all nodes at once,
instead of those of each role when their turn comes. The request is withdrawn when it is answered: actors that wait for
their place ask for the same, and nobody has to pay for nodes of a program that was killed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from deepgen.cluster.resources import Need
from deepgen.errors import UserError

ANSWER_DEADLINE_S = 60.0  # it looks every 5 s, and may be busy with a cloud's interface
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
        try:
            self._request([bundle for need in needs for bundle in [_bundle(need)] * need.count])
            return not self._answer().infeasible_cluster_resource_constraints
        finally:
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

    def _answer(self) -> Any:
        """What it says once it has seen the state of the cluster as it is now."""
        ends, wanted = time.monotonic() + ANSWER_DEADLINE_S, None
        while True:
            status = self._status()
            if wanted is None:
                wanted = status.cluster_resource_state.cluster_resource_state_version
            if status.autoscaling_state.last_seen_cluster_resource_state_version >= wanted:
                return status.autoscaling_state
            if time.monotonic() > ends:
                raise UserError(
                    f"cluster.address: the autoscaler of {self._address} has not said within {ANSWER_DEADLINE_S:g} s "
                    "whether it can provide what the run needs; its log is monitor.log on the head node"
                )
            time.sleep(_LOOK_S)

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


def _bundle(need: Need) -> dict[str, Any]:
    return {"resources": dict(need.per_process), "label_selector": dict(need.labels)}

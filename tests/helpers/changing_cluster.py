"""A fleet of rollout actors on a cluster whose nodes come, drain and die. Prints what happened as JSON.

`python -m tests.helpers.changing_cluster`: in a process of its own, because the cluster is its own, too.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from actors.experience.rollout_fleet import RESTARTS, RolloutFleet, draining_nodes

WAIT_S = 200.0
ENDLESS_S = 600.0


class Sampler:
    """A rollout actor whose group takes as long as it is told, for ever on one node, and is the number of its node."""

    def ready(self) -> str:
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def sample_group(self, told: tuple[float, str], policy: None) -> str:
        seconds, endless = told
        time.sleep(ENDLESS_S if self.ready() == endless else seconds)
        return self.ready()


async def until(condition: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError(f"{what}: not within {WAIT_S:g} s")
        await asyncio.sleep(0.05)


async def main() -> dict[str, Any]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    first, second = (cluster.add_node(num_cpus=1, resources={"slot": 1}) for _ in range(2))
    ray.init(address=cluster.address, log_to_driver=False)
    options: dict[str, Any] = {"num_cpus": 0.1, "resources": {"slot": 1}, "max_restarts": RESTARTS}
    actors = {f"rollout-{n}": ray.remote(Sampler).options(**options).remote() for n in range(3)}
    fleet = RolloutFleet(actors, call_deadline_s=WAIT_S, start_deadline_s=WAIT_S, least=2, draining=draining_nodes)

    async def sample(seconds: float = 0.0, endless: str = "") -> str:
        node: str = (await fleet.call("sample_group", (seconds, endless), lambda: None))[0]
        return node

    await fleet.start()
    found: dict[str, Any] = {"at the start": fleet.working}
    # A node drains while a group is drawn on each: that group is finished there, and no other begins.
    drawn = [asyncio.create_task(sample(2.0)) for _ in range(2)]
    await asyncio.sleep(0.5)
    gcs, preempted = GcsClient(address=cluster.address), DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, _ = gcs.drain_node(first.node_id, preempted, "a test", int(1000 * (time.time() + 600)))
    await until(lambda: fleet.working == 1, "an actor leaves the node that drains")
    found |= {"drain accepted": accepted, "drawn there": first.node_id in await asyncio.gather(*drawn)}
    found["after it"] = sorted({await sample() for _ in range(4)} - {second.node_id})
    third = cluster.add_node(num_cpus=1, resources={"slot": 1})
    await until(lambda: fleet.working == 2, "an actor on the new node")
    found["on the new node"] = third.node_id in await asyncio.gather(*(sample(0.3) for _ in range(2)))
    # A node dies in the middle of a group, which another one draws.
    drawn = [asyncio.create_task(sample(0.1, second.node_id)) for _ in range(2)]
    await asyncio.sleep(0.3)
    cluster.remove_node(second, allow_graceful=False)
    found["drawn by the other"] = set(await asyncio.gather(*drawn)) == {third.node_id}
    for _ in range(2):
        cluster.add_node(num_cpus=1, resources={"slot": 1})
    await until(lambda: fleet.working == 3, "all actors, on nodes enough")
    found["in the end"] = fleet.working
    ray.shutdown()
    cluster.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
    sys.exit(0)

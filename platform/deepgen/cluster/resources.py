"""What a run requests from a cluster, and a check that the cluster can supply it, before anything starts.

CPU requests are shares for placement, not limits. On-policy, rollout and learner take turns, and reward pools wait most
of the time, so together they fit a two-core laptop. Where nodes have GPUs, GPUs decide the placement instead. Left out:
node labels, placement groups, elastic counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from deepgen.config import PoolSettings, Settings, UserError

# Shares of one process of each role; reward pools have settings for theirs. A learner, two rollout actors, the stream
# and four pools fit on one core.
CPU_SHARE = {"learner": 0.35, "rollout": 0.2, "experience": 0.05}
ASK_S = 10.0
GPU_SHARE = {"learner": 1.0, "rollout": 1.0}


@dataclass(frozen=True)
class Need:
    """`count` processes of one role, each requesting `per_process` (Ray resource name -> amount)."""

    role: str
    count: int
    per_process: Mapping[str, float]
    setting: str  # the key that changes `count`


@dataclass(frozen=True)
class Capacity:
    """What a cluster has, or would have if its autoscaler started every node that it may.

    `nodes` lists one entry per kind of node; `total` adds up all nodes. `open`: an autoscaler may start nodes of
    which nobody has told (`deepgen.cluster.node_groups`), as with KubeRay, so these are no limits.
    """

    total: Mapping[str, float]
    nodes: Sequence[Mapping[str, float]] = field(default_factory=tuple)
    open: bool = False


def process_resources(role: str, *, gpus: bool) -> dict[str, float]:
    """Resources of one process of `role` ("learner", "rollout" or "experience"), as Ray names them."""
    resources = {"CPU": CPU_SHARE[role]}
    if gpus and role in GPU_SHARE:
        resources["GPU"] = GPU_SHARE[role]
    return resources


def pool_resources(pool: PoolSettings, *, gpus: bool) -> dict[str, float]:
    """Resources of one replica of a reward pool, as Ray names them."""
    return {"CPU": pool.cpus} | ({"GPU": pool.gpus} if gpus and pool.gpus else {})


def learner_needs(settings: Settings, *, gpus: bool) -> list[Need]:
    """Needs of pretrain and sft: the learner's workers."""
    return [Need("learner worker", settings.train.workers, process_resources("learner", gpus=gpus), "train.workers")]


def rl_needs(settings: Settings, *, gpus: bool) -> list[Need]:
    """Needs of rl: learner, rollout actors, experience stream, and one pool per reward that has a weight."""
    needs = learner_needs(settings, gpus=gpus)
    rollout = process_resources("rollout", gpus=gpus)
    needs.append(Need("rollout actor", settings.rollout.actors, rollout, "rollout.actors"))
    needs.append(Need("experience stream", 1, process_resources("experience", gpus=gpus), "always 1"))
    for name in settings.rewards.used():
        pool = settings.rewards.pools[name]
        needs.append(
            Need(f"{name} reward", pool.least_replicas, pool_resources(pool, gpus=gpus), pool.dotted("replicas"))
        )
    return needs


def cluster_capacity() -> Capacity:
    """Capacity of the connected Ray cluster, including the nodes that its autoscaler may still start."""
    import ray
    from ray._private.state import state

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total = _sum(alive)
    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return Capacity(total, alive, open=_autoscaler_runs())
    groups = [dict(group.resources) for group in config.node_group_configs if group.max_count]
    for key, amount in (state.get_max_resources_from_cluster_config() or {}).items():
        total[key] = max(total.get(key, 0.0), amount)
    return Capacity(total, alive + groups)


def _autoscaler_runs() -> bool:
    """Whether the connected cluster has Ray's autoscaler v2, by what its head has written down."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    return client.internal_kv_get(b"__autoscaler_v2_enabled", b"__autoscaler", timeout=ASK_S) == b"1"


def check_capacity(needs: Sequence[Need], capacity: Capacity) -> None:
    """Raise UserError if `needs` can never be placed on `capacity`; Ray would wait forever.

    Where the capacity is open, the deadlines of the starts (`cluster.start_deadline_s`) decide instead.
    """
    if capacity.open:
        return
    for need in needs:
        if not any(_fits(need.per_process, node) for node in capacity.nodes):
            raise UserError(
                f"cluster: one {need.role} needs {_text(need.per_process)} on one node, "
                f"but no node has that; the largest have {_largest(need.per_process, capacity.nodes)}"
            )
    wanted = _sum({key: amount * need.count for key, amount in need.per_process.items()} for need in needs)
    for key, amount in wanted.items():
        has = capacity.total.get(key, 0.0)
        if amount > has + 1e-6:
            parts = ", ".join(f"{n.count} x {n.role} ({n.setting})" for n in needs if n.per_process.get(key))
            raise UserError(f"cluster: this run needs {amount:g} {key} ({parts}), but the cluster has at most {has:g}")


def _sum(resources: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for item in resources:
        for key, amount in item.items():
            total[key] = total.get(key, 0.0) + amount
    return total


def _fits(wanted: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(key, 0.0) + 1e-6 >= amount for key, amount in wanted.items())


def _largest(wanted: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> str:
    return _text({key: max((node.get(key, 0.0) for node in nodes), default=0.0) for key in wanted})


def _text(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {key}" for key, amount in resources.items())

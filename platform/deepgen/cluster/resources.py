"""What the processes of a run request from a cluster.

CPU requests are shares for placement, not limits. On-policy, rollout and learner take turns, and reward pools wait most
of the time, so together they fit a two-core laptop. Where nodes have GPUs, GPUs decide the placement instead.
`cluster.roles` changes all of this by role.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepgen.config import PoolSettings, Settings
from deepgen.config.schema.roles import LEARNER, REWARD, ROLLOUT, STREAM, RoleSettings
from deepgen.config.schema.sections import ClusterSettings

# Shares of one process of each role. A learner, two rollout actors, the stream and four pools fit on one core.
CPU_SHARE = {LEARNER: 0.35, ROLLOUT: 0.2, STREAM: 0.05, REWARD: 0.05}
GPU_SHARE = {LEARNER: 1.0, ROLLOUT: 1.0}
_ACCELERATOR = "accelerator_type:"  # Ray's name of the resource that nodes with an accelerator have
_TOUCH = 0.001  # of it, which every process on the node can have


@dataclass(frozen=True)
class Placement:
    """What one process asks of its node. resources: as Ray names them. labels: selectors of the node's labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """For `ray.remote` and `.options`."""
        more = {key: amount for key, amount in self.resources.items() if key not in ("CPU", "GPU")}
        asked: dict[str, Any] = {
            "num_cpus": self.resources.get("CPU", 0.0),
            "num_gpus": self.resources.get("GPU", 0.0),
        }
        return (
            asked
            | ({"resources": more} if more else {})
            | ({"label_selector": dict(self.labels)} if self.labels else {})
        )


@dataclass(frozen=True)
class Need:
    """`count` processes of one role, each requesting `per_process` (Ray resource name -> amount)."""

    role: str
    count: int
    per_process: Mapping[str, float]
    setting: str  # the key that changes `count`
    labels: Mapping[str, str] = field(default_factory=dict)


def role_placement(cluster: ClusterSettings, role: str, *, gpus: bool) -> Placement:
    """Of one process of LEARNER, ROLLOUT or STREAM."""
    given = cluster.roles.get(role, RoleSettings())
    amount = GPU_SHARE.get(role, 0.0) if given.gpus is None else given.gpus
    return _placement(given, CPU_SHARE[role], amount if gpus else 0.0)


def pool_placement(cluster: ClusterSettings, pool: PoolSettings, *, gpus: bool) -> Placement:
    """Of one replica of a reward pool: as its own role says, where that says nothing as the role REWARD does."""
    every, own = (cluster.roles.get(name, RoleSettings()) for name in (REWARD, pool.pool_name))
    given = every.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})
    return _placement(given, CPU_SHARE[REWARD], pool.gpus if gpus else 0.0)


def _placement(given: RoleSettings, cpus: float, gpus: float) -> Placement:
    resources = {"CPU": cpus if given.cpus is None else given.cpus}
    if gpus:
        resources["GPU"] = gpus
    if given.accelerator:
        resources[_ACCELERATOR + given.accelerator] = _TOUCH
    return Placement(resources, given.labels)


def learner_needs(settings: Settings, *, gpus: bool) -> list[Need]:
    """Needs of pretrain and sft: the learner's workers."""
    learner = role_placement(settings.cluster, LEARNER, gpus=gpus)
    return [_need("learner worker", settings.train.workers, learner, "train.workers")]


def pool_need(cluster: ClusterSettings, pool: PoolSettings, *, gpus: bool) -> Need:
    """Need of a reward pool: the replicas that it has at least."""
    placement = pool_placement(cluster, pool, gpus=gpus)
    return _need(f"{pool.pool_name} reward", pool.least_replicas, placement, pool.dotted("replicas"))


def rl_needs(settings: Settings, *, gpus: bool) -> list[Need]:
    """Needs of rl: learner, rollout actors, experience stream, and one pool per reward that has a weight."""
    cluster, pools = settings.cluster, settings.rewards.pools
    return [
        *learner_needs(settings, gpus=gpus),
        _need(
            "rollout actor",
            settings.rollout.least_actors,
            role_placement(cluster, ROLLOUT, gpus=gpus),
            "rollout.actors",
        ),
        _need("experience stream", 1, role_placement(cluster, STREAM, gpus=gpus), "always 1"),
        *(pool_need(cluster, pools[name], gpus=gpus) for name in settings.rewards.used()),
    ]


def _need(role: str, count: int, placement: Placement, setting: str) -> Need:
    return Need(role, count, placement.resources, setting, placement.labels)

"""What a program asks the autoscaler, beside others that ask as well. The cluster's state is made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ray.core.generated import autoscaler_pb2

from deepgen.cluster import autoscaler as autoscaler_module
from deepgen.cluster.autoscaler import ANSWER_DEADLINE_S, PATIENCE_S, Autoscaler
from deepgen.cluster.resources import Need
from deepgen.errors import UserError

NEEDS = [Need("judge reward", 2, {"GPU": 1.0}, "x", {"market": "spot"}), Need("stream", 1, {"CPU": 0.05}, "y")]


class Cluster(Autoscaler):
    """A cluster whose autoscaler looks at every third state. before: what happens before a state is read, by number."""

    def __init__(self, has: Callable[[list[Any]], bool], before: dict[int, list[dict[str, Any]]] | None = None) -> None:
        super().__init__("10.0.0.1:6379")
        self.has, self.before, self.asked = has, before or {}, list[list[dict[str, Any]]]()
        self.bundles, self.version, self.seen, self.refused = list[dict[str, Any]](), 0, 0, False
        self.looks = True

    def _request(self, bundles: list[dict[str, Any]]) -> None:
        self.bundles = bundles
        self.asked.append(bundles)

    def _status(self) -> Any:
        self.version += 1
        self.bundles = self.before.get(self.version, self.bundles)
        if self.looks and self.version % 3 == 0:
            self.seen, self.refused = self.version, bool(self.bundles) and not self.has(self.bundles)
        reply = autoscaler_pb2.GetClusterStatusReply()
        reply.cluster_resource_state.cluster_resource_state_version = self.version
        reply.autoscaling_state.last_seen_cluster_resource_state_version = self.seen
        states = [reply.cluster_resource_state.cluster_resource_constraints] if self.bundles else []
        states += [reply.autoscaling_state.infeasible_cluster_resource_constraints] if self.refused else []
        for constraints in states:
            constraint = constraints.add()
            for bundle in self.bundles:
                constraint.resource_requests.add(count=1).request.resources_bundle.update(bundle["resources"])
        return reply


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes in pauses alone."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(autoscaler_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(autoscaler_module.time, "sleep", sleep)


def gpus(bundles: list[dict[str, Any]]) -> int:
    return int(sum(bundle["resources"].get("GPU", 0) for bundle in bundles))


@pytest.mark.parametrize("most", [1, 2])
def test_the_whole_is_asked_for_at_once_and_taken_back(most: int) -> None:
    cluster = Cluster(lambda bundles: gpus(bundles) <= most)
    assert cluster.can_provide(NEEDS) is (most == 2)
    first, last = cluster.asked
    assert [bundle["resources"] for bundle in first[1:]] == [{"GPU": 1.0}, {"GPU": 1.0}, {"CPU": 0.05}]
    assert first[1]["label_selector"] == {"market": "spot"} and last == []


def test_another_ones_request_is_waited_for_and_its_refusal_is_not_ours() -> None:
    other = [{"resources": {"GPU": 99}, "label_selector": {}}]
    cluster = Cluster(lambda bundles: gpus(bundles) <= 2, {1: other, 9: []})
    assert cluster.can_provide(NEEDS) is True
    assert len(cluster.asked) == 2 and cluster.version > 9


def test_what_was_replaced_is_asked_again_until_the_deadline() -> None:
    cluster = Cluster(lambda bundles: True, {10: [{"resources": {"GPU": 99}, "label_selector": {}}], 13: []})
    cluster.looks = False
    with pytest.raises(
        UserError, match=r"^cluster\.address: the autoscaler of 10\.0\.0\.1:6379 has not said within 120 s"
    ):
        cluster.can_provide(NEEDS)
    assert [bool(bundles) for bundles in cluster.asked] == [True, True, False]


def test_a_request_that_was_left_behind_does_not_last() -> None:
    cluster = Cluster(lambda bundles: True)
    cluster.bundles = [{"resources": {"GPU": 99}, "label_selector": {}}]
    assert cluster.can_provide(NEEDS) is True
    assert autoscaler_module.time.monotonic() > PATIENCE_S < ANSWER_DEADLINE_S

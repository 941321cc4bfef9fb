"""Whether a run gets GPUs, and room, on clusters that grow and on others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import deepgen.cluster.connect as connect_module
from deepgen.cluster.capacity import Node, unplaced
from deepgen.cluster.connect import find_room, tell_growth
from deepgen.cluster.resources import Need, rl_needs
from deepgen.config import UserError, load_settings

TINY = load_settings(Path(__file__).resolve().parents[2] / "stages" / "recipes" / "tiny-rl.yaml")
HEAD = Node({"CPU": 1.0}, name="head")
GPU_NODE = Node({"CPU": 8.0, "GPU": 4.0})


class Grows:
    """An autoscaler that may start `most` nodes of one kind."""

    def __init__(self, kind: Node, most: int) -> None:
        self._nodes, self.asked = [HEAD, *[kind] * most], list[Sequence[Need]]()

    def can_provide(self, needs: Sequence[Need]) -> bool:
        self.asked.append(needs)
        return not unplaced(needs, self._nodes)

    def doing(self) -> str:
        return "nodes that start: 1 x worker"


Room = Callable[..., bool]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    """`find_room` on a cluster with these nodes and this autoscaler."""

    def find(nodes: list[Node], autoscaler: Grows | None) -> bool:
        monkeypatch.setattr(connect_module, "cluster_nodes", lambda: nodes)
        monkeypatch.setattr(connect_module, "running_autoscaler", lambda: autoscaler)
        monkeypatch.setattr(connect_module, "tell_growth", lambda *_: None)
        return find_room(TINY, rl_needs)

    return find


def test_a_cluster_that_stays_as_it_is(room: Room) -> None:
    assert room([HEAD], None) is False
    assert room([HEAD, GPU_NODE], None) is True
    with pytest.raises(UserError, match=r"^cluster: the run can never be placed: its one node has"):
        room([Node({"CPU": 0.1})], None)


def test_a_head_without_gpus_grows_to_those_of_its_workers(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    grows = Grows(GPU_NODE, 2)
    assert room([HEAD], grows) is True
    assert [len(needs) for needs in grows.asked] == [1, len(rl_needs(TINY, gpus=True))]
    assert capsys.readouterr().out == "the cluster grows to what the run needs\n"


def test_too_few_gpus_do_not_make_it_a_run_on_cpus(room: Room, capsys: pytest.CaptureFixture[str]) -> None:
    """The learner and two rollout actors want one each."""
    with pytest.raises(UserError, match="its autoscaler has no more that would; allowed: less"):
        room([HEAD], Grows(Node({"CPU": 8.0, "GPU": 2.0}), 1))
    assert "learner worker" in capsys.readouterr().err  # the table


def test_a_cluster_that_has_no_kind_of_node_with_gpus_runs_on_cpus(room: Room) -> None:
    grows = Grows(Node({"CPU": 4.0}), 3)
    assert room([Node({"CPU": 0.0})], grows) is False
    assert len(grows.asked) == 2
    assert room([HEAD], grows) is False  # there is room already
    assert len(grows.asked) == 3


def test_what_the_autoscaler_does_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = [[HEAD], [HEAD], [HEAD, GPU_NODE]]
    monkeypatch.setattr(connect_module, "cluster_nodes", lambda: seen.pop(0))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    tell_growth(Grows(GPU_NODE, 1), [Need("judge", 1, {"GPU": 1}, "")], 60)  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines() == [
        "nodes that start: 1 x worker",
        "the cluster has room for the run: 2 nodes",
    ]

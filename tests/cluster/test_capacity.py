"""What a run asks of a cluster, by role, and whether its nodes have room for that."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from deepgen.cluster.capacity import Node, fits_labels, no_room, unplaced
from deepgen.cluster.resources import Need, pool_placement, rl_needs, role_placement
from deepgen.config import Settings, UserError, load_settings

TINY = Path(__file__).resolve().parents[2] / "stages" / "recipes" / "tiny-rl.yaml"
SPOT, SURE = {"market": "spot"}, {"market": "on-demand"}


def laptop(cpus: float) -> list[Node]:
    return [Node({"CPU": cpus})]


def gpus(count: int, each: float, labels: dict[str, str] | None = None) -> list[Node]:
    return [Node({"CPU": 16, "GPU": each}, labels or {}, f"node-{n}") for n in range(count)]


def need(count: int, amount: float, labels: dict[str, str] | None = None) -> Need:
    return Need("judge reward", count, {"CPU": 0.1, "GPU": amount}, "rewards.judge.replicas", labels or {})


# -- by role ---------------------------------------------------------------------------------------------------------


def test_the_tiny_run_fits_two_cores_with_two_learners() -> None:
    two = load_settings(TINY, ["train.workers=2"])
    assert sum(need.count * need.per_process["CPU"] for need in rl_needs(two, gpus=False)) <= 2
    assert not unplaced(rl_needs(two, gpus=False), laptop(2))
    assert not unplaced(rl_needs(load_settings(TINY), gpus=False), laptop(1))


def test_only_rewards_with_a_weight_are_counted() -> None:
    settings = load_settings(TINY, [f"rewards.weights.{t}={{ocr: 1.0}}" for t in ("t2i", "reasoning", "text", "edit")])
    roles = [need.role for need in rl_needs(settings, gpus=False)]
    assert roles == ["learner worker", "rollout actor", "experience stream", "ocr reward"]


def test_on_gpus_learner_rollout_and_judge_have_one_each() -> None:
    settings = Settings()
    places = [role_placement(settings.cluster, role, gpus=True) for role in ("learner", "rollout", "stream")]
    pools = [pool_placement(settings.cluster, settings.rewards.pools[name], gpus=True) for name in ("judge", "ocr")]
    assert [place.resources.get("GPU") for place in (*places, *pools)] == [1, 1, None, 1, None]
    judge = settings.rewards.pools["judge"]
    assert "GPU" not in pool_placement(settings.cluster, judge, gpus=False).resources
    assert "GPU" not in role_placement(settings.cluster, "learner", gpus=False).resources


def test_a_recipe_says_where_each_role_may_lie(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "cluster:\n  roles:\n    learner: {cpus: 8, accelerator: H100, labels: {market: on-demand}}\n"
        "    reward: {cpus: 0.5, labels: {market: spot}}\n    judge: {labels: {market: '!spot'}}\n"
    )
    settings = load_settings(recipe, ["cluster.roles.rollout.gpus=0.5", "cluster.roles.rollout.labels.market=spot"])
    learner, rollout = (role_placement(settings.cluster, role, gpus=True) for role in ("learner", "rollout"))
    assert learner.resources == {"CPU": 8, "GPU": 1, "accelerator_type:H100": 0.001} and learner.labels == SURE
    assert learner.options() == {
        "num_cpus": 8,
        "num_gpus": 1,
        "resources": {"accelerator_type:H100": 0.001},
        "label_selector": SURE,
    }
    assert rollout.options() == {"num_cpus": 0.2, "num_gpus": 0.5, "label_selector": SPOT}
    judge, ocr = (pool_placement(settings.cluster, settings.rewards.pools[n], gpus=True) for n in ("judge", "ocr"))
    assert (judge.resources, judge.labels) == ({"CPU": 0.5, "GPU": 1}, {"market": "!spot"})
    assert (ocr.resources, ocr.labels) == ({"CPU": 0.5}, SPOT)
    assert {need.role: need.labels for need in rl_needs(settings, gpus=True)}["rollout actor"] == SPOT


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            "cluster.roles.drawer.cpus=1",
            "cluster.roles.drawer: unknown role 'drawer'; allowed: learner, rollout, stream",
        ),
        ("cluster.roles.judge.gpus=2", "cluster.roles.judge.gpus: got 2; .*here rewards.judge.gpus$"),
        ("cluster.roles.reward.gpus=1", "here rewards.NAME.gpus$"),
        ("cluster.roles.stream.gpus=1", "here none$"),
        ("cluster.roles.learner.gpus=0", "cluster.roles.learner.gpus: got 0; allowed: above 0"),
        (
            "cluster.roles.learner.gpus=1.5",
            "cluster.roles.learner.gpus: got 1.5 on the command line; allowed: a mapping",
        ),
        ("cluster.roles.learner.gpu=1", "unknown key 'cluster.roles.learner.gpu' on the command line"),
        ("cluster.roles.learner.labels={a b: c}", "cluster.roles.learner.labels"),
        ("cluster.roles.learner.labels={a: in(b}", "cluster.roles.learner.labels.a: got 'in\\(b'"),
        ("cluster.roles=[learner]", "cluster.roles: got"),
    ],
)
def test_a_role_that_cannot_be_is_one_line(given: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_settings(TINY, [given])
    assert "\n" not in str(caught.value)


# -- room ------------------------------------------------------------------------------------------------------------


def test_processes_are_packed_node_by_node() -> None:
    assert unplaced([need(1, 2)], gpus(4, 1)) == {0: 1}  # 4 GPUs in all, but no node has two
    assert unplaced([need(3, 0.6)], gpus(2, 1)) == {0: 1}  # 1.8 of 2, but two do not fit on one
    assert not unplaced([need(4, 0.4), need(2, 0.2)], gpus(2, 1))
    assert not unplaced([need(8, 1), need(2, 4)], gpus(2, 8))  # the large ones first
    assert unplaced([need(9, 1), need(2, 4)], gpus(2, 8)) == {0: 1}
    assert not unplaced([Need("x", 1, {"CPU": 1}, ""), need(16, 1)], gpus(2, 8))


def test_labels_decide_which_nodes_count() -> None:
    nodes = [*gpus(1, 8, SPOT), *gpus(1, 8, SURE)]
    assert not unplaced([need(8, 1, SPOT), need(8, 1, SURE)], nodes)
    assert unplaced([need(9, 1, SPOT)], nodes) == {0: 1}
    assert unplaced([need(1, 1, {"market": "reserved"})], nodes) == {0: 1}
    for selector, found in {"spot": 1, "!spot": 2, "in(spot, on-demand)": 2, "!in(spot,on-demand)": 1}.items():
        assert sum(fits_labels({"market": selector}, node.labels) for node in [*nodes, Node({})]) == found


def test_a_run_without_room_is_refused_with_a_table() -> None:
    settings = load_settings(TINY, ["rollout.actors=40"])
    first, table = no_room(rl_needs(settings, gpus=False), laptop(2), grows=False)
    head, *rows = table.splitlines()
    assert first.startswith("cluster: the run can never be placed: its one node has no room for all of it; allowed: ")
    assert "less (rollout.actors, " in first
    assert head.split("  ")[1] == "role" and len(rows) == 7
    (rollout,) = (row.split() for row in rows if "rollout" in row)
    assert rollout == ["rollout", "actor", "40", "0.2", "CPU", "32", "2", "CPU"]
    assert "its autoscaler has no more" in no_room([need(1, 2)], gpus(4, 1), grows=True)[0]
    assert "none with these labels" in no_room([need(1, 1, SPOT)], gpus(1, 1), grows=False)[1]


@pytest.mark.ray
def test_a_role_with_a_label_lies_on_a_node_with_it(ray_local: ModuleType) -> None:
    """No node of this cluster has one: the actor waits, as the check before the start has said."""
    settings = load_settings(TINY, ["cluster.roles.rollout.labels.market='!spot'"])
    options = role_placement(settings.cluster, "rollout", gpus=False).options()

    class Here:
        def node(self) -> str:
            return str(ray_local.get_runtime_context().get_node_id())

    actor = ray_local.remote(Here).options(**options).remote()
    assert ray_local.get(actor.node.remote(), timeout=60)
    ray_local.kill(actor)
    elsewhere = ray_local.remote(Here).options(**{**options, "label_selector": SPOT}).remote()
    with pytest.raises(ray_local.exceptions.GetTimeoutError):
        ray_local.get(elsewhere.node.remote(), timeout=0.5)
    ray_local.kill(elsewhere)

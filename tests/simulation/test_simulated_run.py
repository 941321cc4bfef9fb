"""Runs in virtual time against closed forms. The stream, the fleet and the pools are the real ones."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from actors.simulation.simulated_run import Death, simulate
from deepgen.config import Settings, load_settings
from deepgen.planning.scale.phases import CallTime, Phases
from deepgen.planning.scale.splits import Load, Split

# Powers of two, so that sums of them are exact.
PHASES = Phases(
    sample_s=4.0,
    load_s=0.5,
    score_s={"clip": CallTime(0.0, 0.0), "ocr": CallTime(0.0, 0.0)},
    update_s=1.0,
    step_s=0.25,
    publish_s=0.125,
    sync_s=0.0625,
    checkpoint_s=2.0,
    write_s=8.0,
    restart_s=64.0,
    revive_s=32.0,
    control_s=0.0,
)
WAY = PHASES.step_s + PHASES.publish_s + PHASES.sync_s
GROUPS, IMAGES = 8, 4


@pytest.fixture
def settings(root: Path) -> Settings:
    return make(root)


def make(root: Path, *more: str) -> Settings:
    tasks = [f"rewards.weights.{task}={{clip: 1.0}}" for task in ("t2i", "reasoning", "edit")]
    overrides = [f"rollout.prompts_per_step={GROUPS}", f"rollout.group_size={IMAGES}", "experience.overlap=off"]
    recipe = root / "stages" / "recipes" / "tiny-rl.yaml"
    return load_settings(recipe, [*tasks, "rewards.weights.text={clip: 0.5, ocr: 0.5}", *overrides, *more])


def split(workers: int = 1, actors: int = 1, replicas: int = 1) -> Split:
    return Split(workers, actors, {"clip": replicas, "ocr": replicas})


def step_s(settings: Settings, chosen: Split, phases: Phases = PHASES, tasks: str = "t2i") -> float:
    return simulate(settings, chosen, phases, [tasks]).step_s


# -- closed forms ----------------------------------------------------------------------------------------------------


def test_one_actor_on_policy_is_the_sum_of_all(settings: Settings) -> None:
    assert step_s(settings, split()) == pytest.approx(0.5 + GROUPS * 4 + GROUPS * 1 + WAY)


@pytest.mark.parametrize("actors", [2, 3, 8, 20])
def test_many_actors_draw_in_rounds(settings: Settings, actors: int) -> None:
    assert step_s(settings, split(actors=actors)) == pytest.approx(0.5 + math.ceil(GROUPS / actors) * 4 + GROUPS + WAY)


@pytest.mark.parametrize("workers", [2, 8])
def test_ranks_share_the_update(settings: Settings, workers: int) -> None:
    assert step_s(settings, split(workers)) == pytest.approx(0.5 + GROUPS * 4 + GROUPS / workers + WAY)


@pytest.mark.parametrize(("sample_s", "update_s"), [(4.0, 1.0), (1.0, 4.0)])
def test_a_version_behind_the_slower_role_decides(root: Path, sample_s: float, update_s: float) -> None:
    phases = replace(PHASES, sample_s=sample_s, update_s=update_s)
    draw, learn = GROUPS * sample_s + 0.5, GROUPS * update_s + PHASES.step_s + PHASES.publish_s
    behind = make(root, "experience.max_staleness=1")
    assert step_s(behind, split(), phases) == pytest.approx(max(draw, learn), rel=0.01)


def test_taking_groups_one_by_one_hides_the_update(root: Path) -> None:
    arriving = make(root, "experience.overlap=auto", "algorithm.kl=none")
    assert arriving.overlap().pieces
    assert step_s(arriving, split()) == pytest.approx(0.5 + GROUPS * 4 + 1 + WAY)


def test_a_pool_asks_for_several_groups_in_one_call(root: Path) -> None:
    """All groups are drawn at once. Calls of 16 images are two for all 32, calls of 4 are eight."""
    phases = replace(PHASES, score_s={"clip": CallTime(1.0, 0.25), "ocr": CallTime(0.0, 0.0)})
    drawn = 0.5 + 4 + GROUPS + WAY
    for size, calls in ((16, 2), (4, 8)):
        batched = make(root, f"rewards.clip.batch_size={size}")
        assert step_s(batched, split(actors=8), phases) == pytest.approx(drawn + calls + 32 * 0.25)
        assert (
            calls / 2 + 32 * 0.25 / 2
            <= step_s(batched, split(actors=8, replicas=2), phases) - drawn
            < calls + 32 * 0.25
        )


def test_only_rewards_of_the_task_are_asked(settings: Settings) -> None:
    phases = replace(PHASES, score_s={"clip": CallTime(0.0, 0.0), "ocr": CallTime(2.0, 0.0)})
    assert step_s(settings, split(), phases, tasks="text") - step_s(settings, split(), phases) == pytest.approx(2)


def test_the_stream_takes_one_group_after_the_other(settings: Settings) -> None:
    phases = replace(PHASES, control_s=0.5)
    assert step_s(settings, split(actors=8), phases) == pytest.approx(0.5 + 4 + GROUPS * 0.5 + GROUPS + WAY)


def test_idle_shares_are_those_of_the_stream(settings: Settings) -> None:
    outcome = simulate(settings, split(), PHASES, ["t2i"])
    assert outcome.idle["rollout"] == pytest.approx(1 - (0.5 + GROUPS * 4) / outcome.step_s)
    assert outcome.idle["learner"] == pytest.approx(1 - (GROUPS + 0.25 + 0.125) / outcome.step_s)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_the_arithmetic_is_close_where_roles_are_uneven(root: Path, staleness: int) -> None:
    settings = make(root, f"experience.max_staleness={staleness}")
    load = Load(settings, PHASES, {"clip": 1.0, "ocr": 0.0})
    for chosen in (split(), split(actors=2), split(4, 2), split(8, 4)):
        assert load.step_s(chosen) == pytest.approx(step_s(settings, chosen), rel=0.06)


def test_thousands_of_groups(root: Path) -> None:
    large = make(root, "rollout.prompts_per_step=1024")
    assert simulate(large, split(256, 512, 2), PHASES, ["t2i"], steps=2).step_s == pytest.approx(0.5 + 8 + 4 + WAY)


# -- deaths ----------------------------------------------------------------------------------------------------------


def test_two_simulations_are_equal(root: Path) -> None:
    settings, deaths = make(root, "experience.max_staleness=1"), [Death(30, "rollout"), Death(50, "clip")]
    phases = replace(PHASES, score_s={"clip": CallTime(0.5, 0.1), "ocr": CallTime(0.0, 0.0)})
    first, second = (simulate(settings, split(2, 12, 9), phases, ["t2i", "text"], deaths=deaths) for _ in range(2))
    assert first == second


def test_the_group_of_a_dead_actor_is_drawn_again(settings: Settings) -> None:
    """One of two nodes of an actor each dies in the first step, 3 s into its second group; it is back 32 s later.

    The other actor draws the lost group and what is left, 7 instead of 4. Then the learner misses the trajectory of the
    dead actor's first group, which is drawn once more.
    """
    outcome = simulate(
        settings, split(actors=2), PHASES, ["t2i"], steps=2, deaths=[Death(7, "rollout", 1)], node_gpus=1
    )
    assert outcome.replaced == 1
    assert outcome.ends[0] == pytest.approx(7 * 4 + 4 + GROUPS + PHASES.step_s + PHASES.publish_s)


def test_pictures_that_die_with_their_node_are_drawn_again(settings: Settings) -> None:
    """Both actors have drawn half; one dies while its groups wait for the reward, which takes long."""
    phases = replace(PHASES, score_s={"clip": CallTime(100.0, 0.0), "ocr": CallTime(0.0, 0.0)})
    chosen = split(actors=2)
    healthy, disturbed = (
        simulate(settings, chosen, phases, ["t2i"], steps=2, deaths=deaths, node_gpus=1)
        for deaths in ([], [Death(40, "rollout", 1)])
    )
    assert disturbed.ends[0] > healthy.ends[0]
    assert disturbed.ends[1] - disturbed.ends[0] == pytest.approx(healthy.ends[1] - healthy.ends[0], rel=0.3)


def test_a_dead_reward_comes_back(settings: Settings) -> None:
    """Its call is tried again when the replica is there again: the rest of 32 s, and the call once more."""
    phases = replace(PHASES, score_s={"clip": CallTime(8.0, 0.0), "ocr": CallTime(0.0, 0.0)})
    healthy, disturbed = (
        simulate(settings, split(actors=8), phases, ["t2i"], steps=2, deaths=deaths)
        for deaths in ([], [Death(8, "clip")])
    )
    lost = 8 - 4  # of the call that the death ends; then its halves are two calls
    assert disturbed.ends[0] - healthy.ends[0] == pytest.approx(lost + 32 + 8, abs=1.0)


def test_a_learners_death_costs_the_steps_since_its_checkpoint(root: Path) -> None:
    """A checkpoint after every second step; the learner dies 1 s into its fourth."""
    saving = make(root, "train.checkpoint_every=2")
    healthy = simulate(saving, split(), PHASES, ["t2i"], steps=6)
    assert healthy.lives == 1
    at = healthy.ends[2] + 1
    disturbed = simulate(saving, split(), PHASES, ["t2i"], steps=6, deaths=[Death(at, "learner")])
    assert disturbed.lives == 2
    # What was done since the checkpoint of the second step, behind which the third had begun.
    again = at - healthy.ends[1] + PHASES.checkpoint_s
    assert disturbed.ends[-1] - healthy.ends[-1] == pytest.approx(again + PHASES.restart_s)


def test_a_checkpoint_counts_once_it_is_on_disk(root: Path) -> None:
    saving, phases = make(root, "train.checkpoint_every=2"), replace(PHASES, write_s=1000.0)
    healthy = simulate(saving, split(), phases, ["t2i"], steps=3)
    at = healthy.ends[1] + 1
    disturbed = simulate(saving, split(), phases, ["t2i"], steps=3, deaths=[Death(at, "learner")])
    assert disturbed.ends[-1] - healthy.ends[-1] == pytest.approx(at + phases.restart_s, abs=1)

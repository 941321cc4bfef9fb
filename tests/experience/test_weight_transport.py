"""Weights arrive with the same bits whatever they travel by: real processes on a local Ray, a narrow random model."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from actors.experience.policy.policy_version import LoadedPolicy
from actors.experience.policy.weight_sync import fetch_weights
from actors.experience.stream import ExperienceStream
from actors.messages import NIXL, OBJECT_STORE, PolicyWeights, RankBatch
from actors.objectives.publisher import Publisher
from actors.start import start_rollouts
from deepgen.config import UserError
from tests.experience.test_reward_pool import ask_until_dead
from tests.experience.test_stream import arrays, assert_same, run
from tests.helpers.published import SendingLearner
from tests.helpers.rl_world import make_settings, make_world

WAIT_S = 120.0


@pytest.mark.ray
def test_actors_draw_the_same_whatever_weights_travel_by(ray_local: ModuleType, tmp_path: Path) -> None:
    world = make_world(tmp_path)
    settings = make_settings(world, "rollout.prompts_per_step=6")
    learner = ray_local.remote(SendingLearner).options(num_cpus=0.1).remote(settings)
    rollouts = start_rollouts(settings, gpus=False)

    async def two_steps(stream: ExperienceStream, published: list[PolicyWeights]) -> list[RankBatch]:
        batches = []
        for step, weights in enumerate(published):
            await stream.publish(weights)
            batches.append(await stream.next_batch(step, 0, 1))
        return batches

    drawn: dict[str, list[RankBatch]] = {}
    for transport in (OBJECT_STORE, NIXL):
        published = [ray_local.get(learner.publish.remote(v, 1 + v / 100, transport), timeout=WAIT_S) for v in (0, 1)]
        drawn[transport] = run(settings, rollouts, functools.partial(two_steps, published=published))
    for one, other in zip(*drawn.values(), strict=True):
        assert {group.version for group in one.groups} == {group.version for group in other.groups}
        assert_same(arrays(ray_local, one), arrays(ray_local, other))
    for actor in (*rollouts.values(), learner):
        ray_local.kill(actor)


@pytest.mark.ray
def test_nobody_waits_for_the_memory_of_a_dead_learner(ray_local: ModuleType, tmp_path: Path) -> None:
    world = make_world(tmp_path)
    learner = ray_local.remote(SendingLearner).options(num_cpus=0.1).remote(make_settings(world))
    published = ray_local.get(learner.publish.remote(1, 1.01, NIXL), timeout=WAIT_S)
    ray_local.kill(learner)
    with pytest.raises(ray_local.exceptions.RayActorError):
        ask_until_dead(ray_local, learner)
    with pytest.raises(ray_local.exceptions.RayError):
        fetch_weights(published, WAIT_S)


def test_without_the_package_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the learner and in every actor, before anything is drawn."""
    settings = make_settings(make_world(tmp_path), f"experience.transport={NIXL}")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nixl" else find_spec(name))
    client: Any = None
    for make in (lambda: LoadedPolicy(settings), lambda: Publisher(client, "", settings.experience, WAIT_S)):
        with pytest.raises(UserError, match=r"experience\.transport=nixl: the package nixl is missing"):
            make()

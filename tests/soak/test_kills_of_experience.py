"""A dozen kills of what draws and scores, beside the learner's own source: every batch keeps its bits.

`make soak` kills these and all others in whole runs, learner, Ray Train, nodes and driver included (`test_kills.py`).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from actors.learner.protocols import Arriving
from actors.messages import RankBatch
from actors.objectives.experience_source import ExperienceSource
from actors.start import Rollouts, start_rollouts, start_stream
from deepgen.config import Settings
from deepgen.models.unified import UnifiedModel
from deepgen.models.weights_io.folder import weights_checksum
from soak.kills import processes
from soak.schedules import learn
from tests.experience.test_stream_restart import trained
from tests.helpers.rl_world import make_settings, make_world

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
PLANS = {
    0: ("rollout actor", "stream", "reward replica", "stream", "rollout actor", "reward replica"),
    1: ("reward replica", "rollout actor", "stream", "rollout actor", "reward replica", "stream"),
}
WITHIN_S = 0.4  # of a step's begin: about what a step takes
WAIT_S = 200.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def rollouts(ray_local: ModuleType, world: Path) -> Iterator[Rollouts]:
    actors = start_rollouts(settings_of(world, 0), gpus=False)
    yield actors
    for actor in actors.values():
        ray_local.kill(actor)


def settings_of(world: Path, staleness: int) -> Settings:
    rewards = (f"rewards.weights.{task}={{aesthetic: 1.0}}" for task in ("t2i", "edit", "text", "reasoning"))
    return make_settings(
        world, "train.steps=8", f"experience.max_staleness={staleness}", "experience.overlap=on", *rewards
    )


class Killer:
    """Kills a process of a role a random moment after it is told to, from a thread."""

    def __init__(self, seed: int) -> None:
        self._chance, self.killed = random.Random(seed), list[str]()

    def soon(self, role: str) -> threading.Thread:
        thread = threading.Thread(target=self._kill, args=(role, self._chance.uniform(0, WITHIN_S)))
        thread.start()
        return thread

    def _kill(self, role: str, after_s: float) -> None:
        time.sleep(after_s)
        deadline = time.monotonic() + WAIT_S
        while not (running := processes(role)):  # it is starting again
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self._chance.choice(running).kill()
        self.killed.append(role)


def train(ray: ModuleType, settings: Settings, rollouts: Rollouts, plan: tuple[str, ...]) -> tuple[str, list[float]]:
    """A hash of the weights and the sums of the scores of a run. Every bit of a batch reaches the weights."""
    stream = start_stream(settings, rollouts, resume=False, gpus=False)
    context: Any = SimpleNamespace(settings=settings, rank=0, world=1, say=print, device=torch.device("cpu"))
    source, killer = ExperienceSource(context, stream, None), Killer(settings.experience.max_staleness)
    model = UnifiedModel.from_folder(settings.model.weights)
    weights = {name: parameter.data for name, parameter in model.trainable_parameters("rl")}
    engine = trained(model, weights)
    source.publish(engine, 0)
    scores = []
    for step in range(settings.train.steps):
        kill = killer.soon(plan[step]) if step < len(plan) else None
        batch = source.next(step, 0, 1)
        parts = list(batch.pieces) if isinstance(batch, Arriving) else [batch]
        groups = tuple(group for part in parts for group in part.groups)
        assert {group.version for group in groups} == {max(0, step - settings.experience.max_staleness)}
        learn(weights, RankBatch(groups, {}, {}), [group.trajectory for group in groups])
        scores.append(sum(float(group.scores.sum()) for group in groups))
        if kill:
            kill.join()
        source.publish(engine, step + 1)
    source.close()
    ray.kill(stream)
    assert killer.killed == list(plan)
    return weights_checksum(weights.items()), scores


@pytest.mark.parametrize("staleness", PLANS)
def test_a_dozen_deaths_change_nothing(ray_local: ModuleType, world: Path, rollouts: Rollouts, staleness: int) -> None:
    """On-policy, group by group, and one version behind."""
    settings = settings_of(world, staleness)
    calm = train(ray_local, settings, rollouts, ())
    assert train(ray_local, settings, rollouts, PLANS[staleness]) == calm

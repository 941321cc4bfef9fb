"""Runs of one seed under different timings, which must end with the same bits.

A schedule is a number of rollout actors and random delays in every role: before and after an actor samples, before it
takes new weights, in the reward, before the learner asks, before it publishes. The stream, the rollout actors and the
reward pool are the real ones. The learner is a stand-in that is cheap and lets every bit of a batch reach the weights.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from actors.experience.policy.canary import take_canary
from actors.experience.policy.weight_sync import publish_weights
from actors.experience.rollout_actor import Pictures, RolloutActor
from actors.experience.rollout_fleet import WEIGHTS_GROUP
from actors.experience.stream import ExperienceStream
from actors.messages import Arrays, Group, PolicyWeights, RankBatch
from deepgen.config import Settings
from deepgen.data.records import Record
from deepgen.models.unified import UnifiedModel
from deepgen.models.weights_io.folder import weights_checksum
from rewards import PoolSettings, RewardRequest, setting

DEADLINE_S = 300.0


class DelayedBrightness:
    """Mean brightness, 0..1, after a random delay."""

    class Options(PoolSettings):
        delay_s: float = setting(0.1, "Longest delay.", unit="s", ge=0)
        delay_seed: int = setting(0, "Seed of the delays.", ge=0)

    def __init__(self, options: Options) -> None:
        self._random, self._longest_s = random.Random(options.delay_seed), options.delay_s

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        """One score a request."""
        time.sleep(self._random.uniform(0, self._longest_s))
        return [float(request.image.mean()) / 255 for request in requests]


class DelayedRollout(RolloutActor):
    """A rollout actor that takes its time, by a seed that each schedule sets."""

    _random, _longest_s = random.Random(0), 0.0

    def set_delays(self, seed: int, longest_s: float) -> None:
        """Delays of all calls from now on, in seconds."""
        self._random, self._longest_s = random.Random(f"{seed}/{self.name}"), longest_s

    def prefetch(self, published: PolicyWeights) -> None:
        self._wait()
        super().prefetch(published)

    def sample_group(
        self, group: Group, policy: PolicyWeights | None, references: Pictures = ()
    ) -> tuple[Group, list[RewardRequest], Arrays]:
        self._wait()
        drawn = super().sample_group(group, policy, references)
        self._wait()
        return drawn

    def _wait(self) -> None:
        time.sleep(self._random.uniform(0, self._longest_s))


@dataclass(frozen=True)
class Schedule:
    """`actors` of those that are there, and delays of up to `longest_s` seconds from `seed`."""

    seed: int
    actors: int
    longest_s: float


@dataclass(frozen=True)
class Outcome:
    """What a schedule ended with: a hash of the weights, and the version that drew each step's groups."""

    checksum: str
    versions: tuple[int, ...]
    seconds: float


def start_actors(settings: Settings, count: int) -> dict[str, Any]:
    """Handles of `count` delayed rollout actors by name. Ray must be connected."""
    remote = ray.remote(num_cpus=0.2, concurrency_groups={WEIGHTS_GROUP: 1})(DelayedRollout)
    return {f"rollout-{i}": remote.remote(settings, f"rollout-{i}") for i in range(count)}


def draw_schedules(count: int, actors: int, longest_s: float) -> list[Schedule]:
    """The first has one actor and no delays; the others are drawn from their number."""
    drawn = [Schedule(n, random.Random(n).randint(1, actors), longest_s) for n in range(1, count)]
    return [Schedule(0, 1, 0.0), *drawn]


def run_schedule(settings: Settings, prompts: Sequence[Record], actors: dict[str, Any], schedule: Schedule) -> Outcome:
    """All of `train.steps` under one schedule."""
    used = dict(list(actors.items())[: schedule.actors])
    delays = [actor.set_delays.remote(schedule.seed, schedule.longest_s) for actor in used.values()]
    ray.get(delays, timeout=DEADLINE_S)
    return asyncio.run(_run(settings, prompts, used, schedule))


async def _run(settings: Settings, prompts: Sequence[Record], actors: dict[str, Any], schedule: Schedule) -> Outcome:
    pause, begin = random.Random(f"{schedule.seed}/learner"), time.monotonic()
    model = UnifiedModel.from_folder(settings.model.weights)
    weights = {name: parameter.detach() for name, parameter in model.trainable_parameters("rl")}

    def published(version: int) -> PolicyWeights:
        return publish_weights(version, weights, take_canary(model, settings.rollout))

    stream = ExperienceStream(settings, prompts, actors, resume=False)
    versions = []
    await stream.start()
    try:
        await stream.begin()
        await stream.publish(published(0))
        for step in range(settings.train.steps):
            await asyncio.sleep(pause.uniform(0, schedule.longest_s))
            if settings.overlap().pieces:
                for position in range(settings.rollout.prompts_per_step):
                    await stream.next_group(step, position)
                    await asyncio.sleep(pause.uniform(0, schedule.longest_s))
            batch = await stream.next_batch(step, 0, 1)
            (version,) = {group.version for group in batch.groups}
            assert version is not None
            versions.append(version)
            learn(weights, batch, ray.get([group.trajectory for group in batch.groups], timeout=DEADLINE_S))
            await asyncio.sleep(pause.uniform(0, schedule.longest_s))
            await stream.publish(published(step + 1))
    finally:
        await stream.stop()
    return Outcome(weights_checksum(weights.items()), tuple(versions), time.monotonic() - begin)


def learn(weights: dict[str, Tensor], batch: RankBatch, trajectories: Sequence[Arrays]) -> None:
    """Scale all weights by what the groups say, in their order. In fp64, so that no bit of a batch is lost."""
    for group, arrays in zip(batch.groups, trajectories, strict=True):
        means = arrays["trajectory/latents"].astype(np.float64).mean()
        signal = float(group.advantages.astype(np.float64) @ arrays["trajectory/log_probs"].astype(np.float64).mean(0))
        for tensor in weights.values():
            tensor.copy_((tensor.double() * (1 + 1e-3 * torch.tensor(signal + 1e-2 * means).tanh())).float())

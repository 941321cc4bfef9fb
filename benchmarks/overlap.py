"""How much of a step overlaps: three phases of fixed duration, against the slowest of them and against all in a row.

A group takes PHASE_S to be drawn (by the one rollout actor), PHASE_S to be scored (by the one replica) and PHASE_S in
the learner, which sleep. So a step of GROUPS groups has three equal phases; its bound is one of them, and in a row
they take three. Everything between is real: stream, fleet, reward pool, Ray's calls, the learner's source and its
publisher. On-policy the learner takes the groups one by one (`experience.overlap`).

The window leaves out the first two steps, which fill the pipeline.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from actors.experience.rollout_actor import Pictures
from actors.experience.rollout_fleet import WEIGHTS_GROUP
from actors.learner.protocols import Arriving
from actors.messages import Arrays, Group, PolicyWeights
from actors.objectives.experience_source import ExperienceSource
from actors.start import Rollouts, start_stream
from benchmarks.control_plane import own_ray
from deepgen.config import Settings
from deepgen.config.settings import TASKS
from rewards import RewardRequest

if TYPE_CHECKING:
    from benchmarks.timing import Result

PHASE_S = 0.2
GROUPS, IMAGES, SIDE = 32, 4, 32
WARM_UP = 2
DEADLINE_S = 120.0


class SleepingActor:
    """A rollout actor whose groups are noise, after the time of one."""

    def __init__(self, seconds: float = PHASE_S) -> None:
        self._seconds = seconds

    def ready(self) -> None:
        """It has no model to load."""

    def prefetch(self, published: PolicyWeights) -> None:
        """It needs no weights."""

    def sample_group(
        self, group: Group, policy: PolicyWeights | None, references: Pictures = ()
    ) -> tuple[Group, list[RewardRequest], Arrays]:
        """The same three objects as `RolloutActor.sample_group`."""
        time.sleep(self._seconds)
        images = np.random.default_rng(group.number).integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
        requests = [RewardRequest(group.record.prompt, "", group.record.task, image) for image in images]
        keys = tuple(f"{group.number}/{i}".encode() for i in range(IMAGES))
        version, weights = policy.version if policy else 0, np.ones(1, dtype=np.float32)
        return replace(group, version=version, reward_weights=weights, keys=keys), requests, {"x": np.zeros(8)}


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """One result for `max_staleness` 0 and one for 1, with `repeats` steps each. Starts a local Ray."""
    with own_ray(num_cpus=4):
        return [measure(weights, staleness, repeats) for staleness in (0, 1)]


def measure(weights: Path, max_staleness: int, repeats: int) -> Result:
    """Seconds of a step, against the bound."""
    from benchmarks.timing import Result, recipe

    settings = recipe(
        "tiny-rl",
        weights,
        f"train.steps={WARM_UP + repeats}",
        f"rollout.prompts_per_step={GROUPS}",
        f"rollout.group_size={IMAGES}",
        "algorithm.kl=none",
        f"experience.max_staleness={max_staleness}",
        f"experience.deadline_s={DEADLINE_S}",
        "rewards.sleeping.class=benchmarks.control_plane:SleepingReward",
        f"rewards.sleeping.batch_s={PHASE_S}",
        f"rewards.sleeping.batch_size={IMAGES}",
        *(f"rewards.weights.{task}={{sleeping: 1.0}}" for task in TASKS),
    )
    seconds, bound = train(settings)[WARM_UP:], GROUPS * PHASE_S
    times_serial = 3 * bound / statistics.median(seconds)
    text = f"{GROUPS} groups, three phases of {bound:.1f} s: {times_serial:.2f} x in a row"
    return Result(f"overlap, max_staleness {max_staleness}", text, 1, tuple(seconds), (bound,) * len(seconds))


def train(settings: Settings) -> list[float]:
    """Seconds of each step of a learner that sleeps."""
    in_ray = f"sleeping-{settings.experience.max_staleness}"
    actor = ray.remote(num_cpus=0.1, concurrency_groups={WEIGHTS_GROUP: 1})(SleepingActor).options(name=in_ray).remote()
    stream = start_stream(settings, Rollouts({"rollout-0": actor}, {"rollout-0": in_ray}), resume=False, gpus=False)
    ray.get(stream.start.remote(), timeout=DEADLINE_S)
    context: Any = SimpleNamespace(settings=settings, rank=0, world=1, say=print, device=torch.device("cpu"))
    policy: Any = SimpleNamespace(weights=lambda: {"w": torch.zeros(8)}, run=lambda compute, *arguments: 0.0)
    source = ExperienceSource(context, stream, None)
    source.publish(policy, 0)
    ray.get(stream.begin.remote(), timeout=DEADLINE_S)
    seconds = []
    for step in range(settings.train.steps):
        begin = time.monotonic()
        batch = source.next(step, 0, 1)
        for piece in batch.pieces if isinstance(batch, Arriving) else (batch,):
            time.sleep(PHASE_S * len(piece.groups))
        source.publish(policy, step + 1)
        seconds.append(time.monotonic() - begin)
    source.close()
    ray.get(stream.stop.remote(), timeout=DEADLINE_S)
    ray.kill(stream)
    ray.kill(actor)
    return seconds

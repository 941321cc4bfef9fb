"""A run ends in the middle of a step; the next one reads what is finished, on a real local Ray with a narrow model."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest

from actors.experience.journal.group_journal import groups_folder
from actors.experience.journal.origin import JOURNAL
from actors.experience.stream import ExperienceStream
from actors.messages import RankBatch
from actors.start import start_rollouts
from tests.experience.test_stream import run
from tests.helpers.published import publish
from tests.helpers.rl_world import make_settings, make_world

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
GROUPS, IMAGES = 4, 4  # of a step, of a group
RECORD = 32  # bytes of a score
WAIT_S = 200.0


async def half_a_step(stream: ExperienceStream) -> None:
    """Wait until half of the groups are scored."""
    await stream.begin()
    async with asyncio.timeout(WAIT_S):
        while sum(group.done() for group in stream._steps[0].groups) < GROUPS // 2:
            await asyncio.sleep(0.01)


def end(ray: ModuleType, actors: dict[str, Any]) -> None:
    """Kill the actors, and wait until their processes are gone: Ray calls an actor dead while it may still write."""
    pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors.values()], timeout=WAIT_S)
    processes = [psutil.Process(pid) for pid in pids]
    for actor in actors.values():
        ray.kill(actor)
    _, alive = psutil.wait_procs(processes, timeout=WAIT_S)
    assert not alive


def finished(ray: ModuleType, batch: RankBatch) -> list[Any]:
    """Every number of a step: trajectories, scores and advantages of its groups."""
    arrays = ray.get([group.trajectory for group in batch.groups])
    scored = [{"scores": group.scores, "advantages": group.advantages} for group in batch.groups]
    return [one | more for one, more in zip(arrays, scored, strict=True)]


def test_what_was_finished_is_read(ray_local: ModuleType, tmp_path: Path) -> None:
    settings = make_settings(make_world(tmp_path), "experience.journal=1", f"rollout.prompts_per_step={GROUPS}")
    actors = start_rollouts(settings, gpus=False)
    run(settings, actors, half_a_step)
    end(ray_local, actors)
    kept = len(list(groups_folder(settings.run.folder).glob("*.group")))
    (scores,) = (settings.run.folder / JOURNAL).glob("scores-aesthetic-*")
    scored = scores.stat().st_size // RECORD
    assert kept >= GROUPS // 2 and scored >= IMAGES * GROUPS // 2

    actors = start_rollouts(settings, gpus=False)
    weights = publish(settings, 0)

    async def step(stream: ExperienceStream) -> tuple[RankBatch, dict[str, float]]:
        await stream.publish(weights)
        batch = await stream.next_batch(0, 0, 1)
        return batch, stream._rewards.counters()

    rest, counters = run(settings, actors, step)
    assert (rest.metrics["journal/groups_read"], rest.metrics["journal/skipped"]) == (kept, 0)
    assert counters["pool/aesthetic/cache_hits"] == scored
    assert counters["pool/aesthetic/unwritten"] == 0
    shutil.rmtree(settings.run.folder / JOURNAL)
    whole, counters = run(settings, actors, step)
    assert whole.metrics["journal/groups_read"] == counters["pool/aesthetic/cache_hits"] == 0
    for one, other in zip(finished(ray_local, rest), finished(ray_local, whole), strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name], equal_nan=name == "scores") for name in one)
    end(ray_local, actors)

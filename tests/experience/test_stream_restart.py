"""The stream's process dies: it starts again, its learner publishes what it needs, every batch has the same bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.experience.stream_client import Request, StreamClient, VersionGoneError
from actors.objectives.experience_source import ExperienceSource, RLBatch
from actors.start import Rollouts, start_rollouts, start_stream
from deepgen.config import Settings
from deepgen.data.parquet import read_records
from deepgen.models.unified import UnifiedModel
from tests.helpers.rl_world import make_settings, make_world

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 4
WAIT_S = 300.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    world: Path = make_world(tmp_path_factory.mktemp("world"))
    return make_settings(world, f"train.steps={STEPS}", "experience.max_staleness=1", "rollout.prompts_per_step=4")


@pytest.fixture(scope="module")
def rollouts(ray_local: ModuleType, settings: Settings) -> Iterator[Rollouts]:
    actors = start_rollouts(settings, gpus=False)
    yield actors
    for actor in actors.values():
        ray_local.kill(actor)


class Killer:
    """Ends the stream's process with SIGKILL."""

    def __init__(self, stream: Any) -> None:
        self.client = StreamClient(stream, WAIT_S)

    def __call__(self) -> None:
        os.kill(self.pid(), signal.SIGKILL)

    def pid(self) -> int:
        """The number of the process that it lives in now."""
        number: int = self.client.ask("__ray_call__", lambda stream: os.getpid())
        return number

    def in_next_call(self, client: StreamClient) -> None:
        """When `client` has made its next call, before the answer."""
        request, pid = client.request, self.pid()

        def killed(method: str, *arguments: Any, **named: Any) -> Request:
            client.request = request  # type: ignore[method-assign]
            made = request(method, *arguments, **named)
            os.kill(pid, signal.SIGKILL)
            return made

        client.request = killed  # type: ignore[method-assign]


def trained(model: UnifiedModel, weights: dict[str, Any]) -> Any:
    """A learner's engine that holds these weights."""
    for name, parameter in model.trainable_parameters("rl"):
        parameter.data.copy_(weights[name])
    return SimpleNamespace(weights=lambda: weights, run=lambda compute, *arguments: compute(model, *arguments))


def lost_object(ray: ModuleType) -> Any:
    """A reference to an object whose owner is dead."""

    class Owner:
        def make(self) -> list[Any]:
            return [ray.put(np.zeros(1 << 20))]

    owner = ray.remote(num_cpus=0.1)(Owner).remote()
    (reference,) = ray.get(owner.make.remote(), timeout=WAIT_S)
    ray.kill(owner)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            ray.get(reference, timeout=WAIT_S)
        except ray.exceptions.ObjectLostError:
            return reference
        time.sleep(0.1)
    raise AssertionError("the object survives its owner")


def train(ray: ModuleType, settings: Settings, rollouts: Rollouts, *, disturbed: bool) -> list[RLBatch]:
    """The batches of a run whose weights depend on the step alone."""
    stream = start_stream(settings, rollouts, resume=False, gpus=False)
    said: list[str] = []
    context: Any = SimpleNamespace(settings=settings, rank=0, world=1, say=said.append, device=torch.device("cpu"))
    source, kill = ExperienceSource(context, stream, None), Killer(stream)
    model = UnifiedModel.from_folder(settings.model.weights)
    start = {name: parameter.detach().clone() for name, parameter in model.trainable_parameters("rl")}
    source.publish(trained(model, start), 0)
    batches = []
    for step in range(STEPS):
        if disturbed and step == 1:
            source._publisher.finish()
            kill.in_next_call(source._client)  # while the batch is waited for
        if disturbed and step == 2:
            source._publisher.finish()
            kill()  # nobody is in a call: the next one meets a stream that knows nothing
        batch = source.next(step, 0, 1)
        assert isinstance(batch, RLBatch)
        batches.append(batch)
        if disturbed and step == 3:
            (again,) = source._fetched([replace(batch.groups[0], trajectory=lost_object(ray))])
            assert_same(again.trajectory, batch.groups[0].trajectory)
            assert len(said) == 1 and all("its samples were lost with their node" in line for line in said)
        moved = {name: tensor * (1 + (step + 1) / 100) for name, tensor in start.items()}
        source.publish(trained(model, moved), step + 1)
    source.close()
    if disturbed:
        with pytest.raises(VersionGoneError):
            kill.client.ask("evaluate", read_records(settings.data.heldout), 1, version=1)
    ray.kill(stream)
    return batches


def test_a_stream_that_dies_changes_nothing(ray_local: ModuleType, settings: Settings, rollouts: Rollouts) -> None:
    calm = train(ray_local, settings, rollouts, disturbed=False)
    rough = train(ray_local, settings, rollouts, disturbed=True)
    for step, (one, other) in enumerate(zip(calm, rough, strict=True)):
        assert [group.version for group in one.groups] == [max(0, step - 1)] * 4
        for left, right in zip(one.groups, other.groups, strict=True):
            assert (left.number, left.version) == (right.number, right.version)
            np.testing.assert_array_equal(left.advantages, right.advantages)
            assert_same(left.trajectory, right.trajectory)


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)

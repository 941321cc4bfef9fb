"""How long rollout actors wait for control: hundreds of actors that sleep instead of sampling, on one machine.

Stream, fleet, reward pools, Ray calls and objects are real, and the stream has a process of its own, as in a run. Few
processes host the actors: each is an asyncio actor under many names, where a group is a sleep of GROUP_S that leaves
images and a trajectory in the object store. Rewards sleep, too. A stand-in for the learner takes the batches at
max_staleness 1, so that nobody waits for it: what actors wait for is control.

An actor waits when it is not in a group. The time to store a group's results and delays of the host count as waiting.
The window leaves out the first step, when the actors begin, and what comes after the last step but one, when they run
out of work.

The last row is the floor: as many actors whose calls a bare asyncio actor makes, two at a time to each, without pools,
learner or anything else of ours.

Left out: a network between nodes, and objects of real size. Above 100 KB an object's size is nothing to the stream: it
does not leave the node where it was made until somebody reads it.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import ray

from actors.experience.policy.weight_sync import publish_weights
from actors.experience.rollout_actor import Pictures
from actors.experience.rollout_fleet import WEIGHTS_GROUP
from actors.messages import Arrays, Canary, Group, PolicyWeights, RankBatch
from actors.start import Rollouts, start_stream
from deepgen.cluster.private import start_private
from deepgen.config import PoolSettings, Settings
from deepgen.config.settings import TASKS
from deepgen.data.records import Record
from rewards import RewardRequest, setting

if TYPE_CHECKING:
    from benchmarks.timing import Result  # late everywhere: the actors here need no torch

ACTORS = (128, 256, 512)
GROUP_S = 2.0
HOSTS = 2  # processes
IMAGES, SIDE = 8, 96  # of a group; 221 KB
TRAJECTORY_BYTES = 256 << 10
ROUNDS = 2  # groups of a step and actor
BATCH = 256  # images of a reward's call
DEADLINE_S = 120.0


class SleepingReward:
    """Scores by the first pixel, after the time that a batch takes."""

    class Options(PoolSettings):
        batch_s: float = setting(0.02, "Seconds of a batch.", unit="s", ge=0)

    def __init__(self, options: Options) -> None:
        self._batch_s = options.batch_s

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        """One score a request."""
        time.sleep(self._batch_s)
        return [float(request.image[0, 0, 0]) / 255 for request in requests]


class Host:
    """Any number of rollout actors that sleep. They share this process, and its event loop runs their calls at once.

    An actor runs one group at a time; its next one may wait for it here.
    """

    def __init__(self, rewards: int) -> None:
        self._begun: list[float] = []
        self._works: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        noise = np.random.default_rng(os.getpid())
        self._images = noise.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
        self._arrays = {"trajectory/latents": np.zeros(TRAJECTORY_BYTES // 4, dtype=np.float32)}
        self._weights = np.ones(rewards, dtype=np.float32)

    async def ready(self, actor: str) -> None: ...

    async def prefetch(self, actor: str, published: PolicyWeights) -> None: ...

    async def sample_group(
        self, actor: str, group: Group, policy: PolicyWeights | None, references: Pictures = ()
    ) -> tuple[Group, list[RewardRequest], Arrays]:
        async with self._works[actor]:
            self._begun.append(time.monotonic())
            await asyncio.sleep(GROUP_S)
        record, keys = group.record, tuple(f"{group.number}/{i}".encode() for i in range(IMAGES))
        requests = [RewardRequest(record.prompt, record.answer, record.task, image) for image in self._images]
        version = policy.version if policy else 0
        return replace(group, version=version, reward_weights=self._weights, keys=keys), requests, self._arrays

    async def begun(self) -> list[float]:
        """When each group began, on this machine's monotonic clock."""
        return self._begun


class Hosted:
    """The handle of one of a host's actors: `handle.method.remote(...)`. `host`: the name of its process in Ray."""

    def __init__(self, actor: str, host: str) -> None:
        self._actor, self._host = actor, host

    def __getattr__(self, method: str) -> _Method:
        if method.startswith("_"):
            raise AttributeError(method)  # pickle asks for some
        return _Method(self._actor, getattr(_host(self._host), method))


@dataclass(frozen=True)
class _Method:
    """A method of one of a host's actors."""

    actor: str
    of_host: Any

    def options(self, **options: Any) -> _Method:
        return _Method(self.actor, self.of_host.options(**options))

    def remote(self, *arguments: Any) -> Any:
        return self.of_host.remote(self.actor, *arguments)


@functools.cache
def _host(name: str) -> Any:
    return ray.get_actor(name)


class Bare:
    """Calls actors without end, like a stream that does nothing with what they return."""

    def __init__(self, handles: list[Hosted]) -> None:
        self._handles = handles

    async def run(self, seconds: float) -> None:
        end, record = time.monotonic() + seconds, Record("0", "t2i", "a prompt", "an answer", None, (), "")
        group = Group(0, 0, 0, record)

        async def keep_busy(handle: Hosted) -> None:
            call = handle.sample_group.options(num_returns=3)
            ahead = call.remote(group, None)
            while time.monotonic() < end:
                now, ahead = ahead, call.remote(group, None)
                await now[0]

        await asyncio.gather(*map(keep_busy, self._handles))


@dataclass(frozen=True)
class Observed:
    """Moments on the machine's monotonic clock, s: borders of the repetitions, and when each group began.

    whole_cpu, stream_cpu: CPU seconds at each border of all processes, and of the stream's; empty if not looked at.
    """

    actors: int
    borders: tuple[float, ...]
    whole_cpu: tuple[float, ...]
    stream_cpu: tuple[float, ...]
    groups: np.ndarray

    def busy(self, begin: float, end: float) -> float:
        """Actor seconds in groups between two moments."""
        inside = np.minimum(self.groups + GROUP_S, end) - np.maximum(self.groups, begin)
        return float(np.clip(inside, 0, None).sum())

    def result(self, name: str) -> Result:
        """Seconds of an actor for each group, against GROUP_S, between each two borders."""
        from benchmarks.timing import Result

        begin, end = self.borders[0], self.borders[-1]
        busy = self.busy(begin, end)
        groups, waited = busy / GROUP_S, 1 - busy / (self.actors * (end - begin))
        text = f"actors wait {waited:.1%}; {groups / (end - begin):.0f} groups/s; "
        text += f"{_ms(self.whole_cpu, groups)} CPU a group"
        if self.stream_cpu:
            text += f", {_ms(self.stream_cpu, groups)} in the stream"
        ours = tuple(GROUP_S * self.actors * (b - a) / self.busy(a, b) for a, b in itertools.pairwise(self.borders))
        return Result(f"control, {name}{self.actors} actors", text, 1, ours, tuple(GROUP_S for _ in ours))


def _ms(cpu: Sequence[float], groups: float) -> str:
    return f"{1000 * (cpu[-1] - cpu[0]) / groups:.1f} ms"


@contextmanager
def own_ray(num_cpus: int, object_store_bytes: int = 1 << 30) -> Iterator[None]:
    """A local Ray for as long as the context lasts."""
    os.environ |= {"RAY_worker_niceness": "0"}  # not 15: anything else on this machine would starve them
    start_private(num_cpus, log_to_driver=False, object_store_memory=object_store_bytes)
    try:
        yield
    finally:
        ray.shutdown()


def run(weights: Path, repeats: int, threads: int) -> list[Result]:
    """One result for each number of actors, with a window of `repeats` steps. Starts a local Ray for each."""
    return [*(measure(weights, actors, repeats) for actors in ACTORS), measure_floor(max(ACTORS), repeats)]


def measure(weights: Path, actors: int, repeats: int) -> Result:
    """Run `actors` for a window of `repeats` steps."""
    from benchmarks.timing import recipe

    both = [f"rewards.weights.{task}={{first: 1.0, second: 1.0}}" for task in TASKS]
    sleeping = [
        f"rewards.{name}.{setting}"
        for name in ("first", "second")
        for setting in ("class=benchmarks.control_plane:SleepingReward", f"batch_size={BATCH}")
    ]
    settings = recipe(
        "tiny-rl",
        weights,
        f"train.steps={repeats + 2}",
        f"rollout.prompts_per_step={ROUNDS * actors}",
        f"rollout.group_size={IMAGES}",
        "experience.max_staleness=1",
        f"experience.deadline_s={DEADLINE_S}",
        *both,
        *sleeping,
    )
    with own_ray(num_cpus=2, object_store_bytes=3 << 30):
        return _observe(settings, actors).result("")


def measure_floor(actors: int, repeats: int) -> Result:
    """What Ray alone takes for the calls of as long a window."""
    with own_ray(num_cpus=2, object_store_bytes=3 << 30):
        handles, hosts = _start_hosts(actors, rewards=2)
        bare = ray.remote(num_cpus=0.1)(Bare).remote(list(handles.values()))
        step_s = ROUNDS * GROUP_S
        ended = bare.run.remote((repeats + 2) * step_s)
        borders, cpu = [], []
        for _ in range(repeats + 1):
            time.sleep(step_s)  # the first one: the actors begin
            borders.append(time.monotonic())
            cpu.append(_whole_cpu())
        ray.get(ended, timeout=DEADLINE_S)
        return Observed(actors, tuple(borders), tuple(cpu), (), _begun(hosts)).result("bare Ray, ")


def _start_hosts(actors: int, rewards: int) -> tuple[dict[str, Hosted], list[Any]]:
    """The actors by name, and the processes that host them."""
    options: dict[str, Any] = {
        "num_cpus": 0.1,
        "max_concurrency": 2 * actors,
        "concurrency_groups": {WEIGHTS_GROUP: actors},
    }
    remote = ray.remote(**options)(Host)
    hosts = [remote.options(name=f"host-{i}").remote(rewards) for i in range(HOSTS)]
    return {(name := f"rollout-{i}"): Hosted(name, f"host-{i % HOSTS}") for i in range(actors)}, hosts


def _begun(hosts: Sequence[Any]) -> np.ndarray:
    begun = ray.get([host.begun.remote() for host in hosts], timeout=DEADLINE_S)
    return np.sort(np.concatenate(begun))


def _observe(settings: Settings, actors: int) -> Observed:
    import torch

    handles, hosts = _start_hosts(actors, len(settings.rewards.used()))
    stream = start_stream(settings, Rollouts(handles, dict[str, Any](handles)), resume=False, gpus=False)
    ray.get(stream.start.remote(), timeout=DEADLINE_S)
    ray.get(stream.begin.remote(), timeout=DEADLINE_S)
    borders, whole_cpu, stream_cpu = [], [], []
    for step in range(settings.train.steps):
        batch: RankBatch = ray.get(stream.next_batch.remote(step, 0, 1), timeout=DEADLINE_S)
        borders.append(time.monotonic())
        whole_cpu.append(_whole_cpu())
        stream_cpu.append(ray.get(stream.__ray_call__.remote(_cpu_seconds), timeout=DEADLINE_S))
        ray.get([group.trajectory for group in batch.groups], timeout=DEADLINE_S)
        published = publish_weights(step + 1, {"weight": torch.full((8,), float(step))}, Canary(0.0, None))
        ray.get(stream.publish.remote(published), timeout=DEADLINE_S)
    begun = _begun(hosts)
    ray.get(stream.stop.remote(), timeout=DEADLINE_S)
    # Without the last step, at whose end the actors have run out of work.
    return Observed(actors, tuple(borders[:-1]), tuple(whole_cpu[:-1]), tuple(stream_cpu[:-1]), begun)


def _cpu_seconds(stream: Any) -> float:
    return time.process_time()


def _whole_cpu() -> float:
    """CPU seconds of this process and of Ray's, which it has started."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))

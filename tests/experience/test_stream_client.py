"""Whose death an error tells: the stream's own, or that of an actor which the stream has asked."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from actors.experience.stream_client import StreamClient, StreamLostError

pytestmark = pytest.mark.ray
KINDS = {"died": ActorDiedError, "unavailable": lambda: ActorUnavailableError("a reward is unavailable", b"1" * 16)}


class Asks:
    """Stands in for a stream that meets the death of another actor."""

    def __init__(self) -> None:
        self._calls = 0

    def start(self, kind: str) -> None:
        self._calls += 1
        raise KINDS[kind]()

    def calls(self) -> int:
        return self._calls


def start_asks() -> Any:
    return ray.remote(num_cpus=0)(Asks).remote()


@pytest.mark.parametrize("kind", KINDS)
def test_the_death_of_another_actor_is_not_the_stream_s(ray_local: ModuleType, kind: str) -> None:
    client = StreamClient(start_asks(), 60.0)
    with pytest.raises(RayTaskError) as caught:
        client.ask("start", kind)
    assert not isinstance(caught.value, StreamLostError)
    assert client.ask("calls") == 1


def ask_until_dead(client: StreamClient) -> None:
    while True:
        client.ask("calls")


def test_a_dead_stream_is_lost(ray_local: ModuleType) -> None:
    stream = start_asks()
    client = StreamClient(stream, 60.0)
    client.ask("calls")
    ray_local.kill(stream)
    with pytest.raises(StreamLostError, match="the experience stream is gone, in calls"):
        ask_until_dead(client)  # `kill` returns before the actor is dead

"""The way of the learner's weights to the stream: a copy for the learner, the rest behind its back."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.messages import PolicyWeights
from actors.objectives import experience_source
from actors.objectives.experience_source import ExperienceSource, saved_policies
from deepgen.config import load_settings

WAIT_S = 20.0


class Publishing:
    """A stream that takes versions when it is allowed to, and what it has been given."""

    def __init__(self) -> None:
        self.allowed, self.given = threading.Event(), list[tuple[int, float]]()
        self.error: Exception | None = None

    def put(self, version: int, weights: dict[str, Tensor]) -> PolicyWeights:
        """In the place of `publish_weights`."""
        assert self.allowed.wait(WAIT_S)
        self.given.append((version, float(weights["w"][0])))
        return PolicyWeights(version, "", ("w",), ())

    def answer(self, reference: Any) -> Any:
        """In the place of waiting for the stream."""
        if self.error:
            raise self.error
        return reference


@pytest.fixture
def publishing(monkeypatch: pytest.MonkeyPatch) -> Publishing:
    stand_in = Publishing()
    monkeypatch.setattr(experience_source, "publish_weights", stand_in.put)
    monkeypatch.setattr(ExperienceSource, "_ask", lambda self, reference: stand_in.answer(reference))
    return stand_in


def make_source(staleness: int = 0) -> ExperienceSource:
    settings = load_settings(None, [f"experience.max_staleness={staleness}"])
    context: Any = SimpleNamespace(settings=settings, rank=0)
    stream: Any = SimpleNamespace(publish=SimpleNamespace(remote=lambda published: published))
    return ExperienceSource(context, stream, None)


def test_the_learner_goes_on_while_its_weights_travel(publishing: Publishing) -> None:
    source, weights = make_source(), {"w": torch.ones(3)}
    source.publish(lambda: weights, 1)  # returns, although nobody takes anything yet
    weights["w"].fill_(2)  # the next update
    assert publishing.given == []
    publishing.allowed.set()
    source.publish(lambda: weights, 2)
    source.close()
    assert publishing.given == [(1, 1.0), (2, 2.0)]


def test_what_went_wrong_comes_up_in_the_next_call(publishing: Publishing, tmp_path: Path) -> None:
    source = make_source()
    publishing.error = ZeroDivisionError("an actor refused the weights")
    publishing.allowed.set()
    source.publish(lambda: {"w": torch.ones(3)}, 1)
    save = source.writer(1)
    with pytest.raises(ZeroDivisionError, match="refused"):
        save(tmp_path)
    source.close()


def test_an_error_of_the_publisher_ends_the_wait_for_a_batch(
    publishing: Publishing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch needs the version that failed: without this the learner would wait until its deadline."""
    source = make_source()
    source._stream.next_batch = SimpleNamespace(remote=lambda *_: "never")
    publishing.error = ZeroDivisionError("an actor refused the weights")
    source.publish(lambda: {"w": torch.ones(3)}, 1)

    def wait(references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        assert references == ["never"]
        publishing.allowed.set()  # it fails while the batch is waited for
        return [], references

    monkeypatch.setattr(experience_source.ray, "wait", wait)
    with pytest.raises(ZeroDivisionError, match="refused"):
        source.next(1, 0, 1)
    source.close()


def test_a_checkpoint_holds_the_versions_of_the_next_steps(
    publishing: Publishing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experience_source, "fetch_weights", lambda published, _: {"w": [float(published.version)] * 3})
    publishing.allowed.set()
    for staleness, saved in ((0, []), (2, [3, 4])):
        source, folder = make_source(staleness), tmp_path / str(staleness)
        folder.mkdir()
        for version in range(6):
            source.publish(lambda: {"w": torch.ones(3)}, version)
        save = source.writer(5)
        source.publish(lambda: {"w": torch.ones(3)}, 6)  # the run goes on before the checkpoint is written
        save(folder)
        assert saved_policies(folder) == saved
        source.close()

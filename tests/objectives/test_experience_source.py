"""The way of the learner's weights to the stream: a copy for the learner, the rest behind its back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.experience import stream_client
from actors.experience.journal.group_journal import groups_folder
from actors.experience.policy.canary import known_kernels
from actors.experience.policy.weight_sync import WeightsMismatchError
from actors.experience.stream_client import StreamClient
from actors.learner.checkpoints.checkpoint_store import CheckpointStore
from actors.messages import Canary, PolicyWeights, RankBatch
from actors.objectives import experience_source, publisher
from actors.objectives.experience_source import ExperienceSource, saved_policies
from deepgen.config import load_settings

WAIT_S = 20.0


class Publishing:
    """A stream that takes versions when it is allowed to, and what it has been given."""

    def __init__(self) -> None:
        self.allowed, self.given = threading.Event(), list[tuple[int, float]]()
        self.error: Exception | None = None
        self.batch = RankBatch((), {}, {})

    def put(self, version: int, weights: dict[str, Tensor], canary: Canary, transport: str) -> PolicyWeights:
        """In the place of `publish_weights`."""
        assert self.allowed.wait(WAIT_S)
        self.given.append((version, float(weights["w"][0])))
        return PolicyWeights(version, "", ("w",), (), canary)

    def ask(self, method: str, *arguments: Any, **_: Any) -> Any:
        """In the place of the stream."""
        if self.error:
            raise self.error
        answers = {"next_batch": self.batch}
        return answers.get(method, {"step": 4})


@pytest.fixture
def publishing(monkeypatch: pytest.MonkeyPatch) -> Publishing:
    stand_in = Publishing()
    monkeypatch.setattr(publisher, "publish_weights", stand_in.put)
    monkeypatch.setattr(StreamClient, "ask", lambda self, *arguments, **named: stand_in.ask(*arguments, **named))
    return stand_in


def make_source(staleness: int = 0) -> ExperienceSource:
    settings = load_settings(None, [f"experience.max_staleness={staleness}"])
    context: Any = SimpleNamespace(settings=settings, rank=0, world=1, device=torch.device("cpu"))
    source = ExperienceSource(context, None, None)
    source._introduced = True  # the first version is waited for
    return source


def trained(weights: dict[str, Tensor]) -> Any:
    """A learner's engine whose canary says 0.1."""
    return SimpleNamespace(weights=lambda: weights, run=lambda compute, *arguments: 0.1)


def test_the_learner_goes_on_while_its_weights_travel(publishing: Publishing) -> None:
    source, weights = make_source(), {"w": torch.ones(3)}
    source.publish(trained(weights), 1)  # returns, although nobody takes anything yet
    weights["w"].fill_(2)  # the next update
    assert publishing.given == []
    publishing.allowed.set()
    source.publish(trained(weights), 2)
    source.close()
    assert publishing.given == [(1, 1.0), (2, 2.0)]


def test_what_went_wrong_comes_up_in_the_next_call(publishing: Publishing, tmp_path: Path) -> None:
    source = make_source()
    publishing.error = ZeroDivisionError("an actor refused the weights")
    publishing.allowed.set()
    source.publish(trained({"w": torch.ones(3)}), 1)
    save = source.writer(1)
    with pytest.raises(ZeroDivisionError, match="refused"):
        save(tmp_path)
    source.close()


def test_an_error_of_the_publisher_ends_the_wait_for_a_batch(
    publishing: Publishing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch needs the version that failed: without this the learner would wait until its deadline."""
    monkeypatch.undo()
    monkeypatch.setattr(publisher, "publish_weights", publishing.put)
    source = make_source()
    broken = SimpleNamespace(remote=lambda *_: 1 / 0)
    stream = SimpleNamespace(next_batch=SimpleNamespace(remote=lambda *_: "never"), publish=broken)
    source._client._stream = stream
    source.publish(trained({"w": torch.ones(3)}), 1)

    def wait(references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        assert references == ["never"]
        publishing.allowed.set()  # it fails while the batch is waited for
        return [], references

    monkeypatch.setattr(stream_client.ray, "wait", wait)
    with pytest.raises(ZeroDivisionError):
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
            source.publish(trained({"w": torch.ones(3)}), version)
        save = source.writer(5)
        source.publish(trained({"w": torch.ones(3)}), 6)  # the run goes on before the checkpoint is written
        save(folder)
        assert saved_policies(folder) == saved
        source.close()


def test_the_journal_keeps_what_a_resume_draws(
    publishing: Publishing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(None, ["experience.journal=1", f"run.dir={tmp_path}", "run.name=a"])
    newest: list[Any] = [None]
    monkeypatch.setattr(CheckpointStore, "newest", lambda _: newest[-1])
    monkeypatch.setattr(ExperienceSource, "_fetched", lambda _, groups: tuple(groups))
    folder = groups_folder(settings.run.folder)
    folder.mkdir(parents=True)
    for step in range(5):
        (folder / f"step-{step:06d}-key.group").touch()

    def kept(rank: int) -> list[str]:
        context: Any = SimpleNamespace(settings=settings, rank=rank, world=2, stage="rl", device=torch.device("cpu"))
        source = ExperienceSource(context, None, None)
        source.next(4, rank, 2)
        source.close()
        return sorted(file.name[:11] for file in folder.iterdir())

    assert len(kept(0)) == 5  # there is no checkpoint: a resume begins with step 0
    newest.append(SimpleNamespace(step=3))
    assert len(kept(1)) == 5
    assert kept(0) == ["step-000003", "step-000004"]


def test_what_steps_are_drawn_with_is_told_at_once(publishing: Publishing, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that has started again would take the newest alone for all that there is, and begin no older step."""
    told: list[tuple[int, list[int], int]] = []

    def ask(method: str, newest: PolicyWeights, step: int, _: str, earlier: list[PolicyWeights]) -> None:
        assert method == "publish"
        told.append((newest.version, [one.version for one in earlier], step))

    monkeypatch.setattr(publishing, "ask", ask)
    publishing.allowed.set()
    source = make_source(staleness=2)
    for version in range(5):
        source.publish(trained({"w": torch.ones(3)}), version)
    source.close()
    assert told == [(0, [], 0), (1, [0], 1), (2, [0, 1], 2), (3, [1, 2], 3), (4, [2, 3], 4)]


def test_the_journal_forgets_while_the_next_checkpoint_is_written(
    publishing: Publishing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint after every step, one is always under way."""
    settings = load_settings(None, ["experience.journal=1", f"run.dir={tmp_path}", "run.name=a"])
    context: Any = SimpleNamespace(settings=settings, rank=0, world=1, stage="rl", device=torch.device("cpu"))
    source, newest, forgotten = ExperienceSource(context, None, None), [0], list[int]()
    monkeypatch.setattr(CheckpointStore, "newest", lambda _: SimpleNamespace(step=newest[-1]))
    monkeypatch.setattr(ExperienceSource, "_fetched", lambda _, groups: tuple(groups))
    monkeypatch.setattr(experience_source, "forget_groups", lambda _, before: forgotten.append(before))
    for step in range(3):
        source.next(step, 0, 1)
        newest.append(step)  # the checkpoint before is complete
        source.writer(step + 1)
    assert forgotten == [0, 1]
    newest.append(3)
    source.close()
    assert forgotten == [0, 1, 3]


def test_the_start_weights_are_compared_before_the_first_batch(publishing: Publishing) -> None:
    """Actors may draw before the learner publishes version 0. If theirs are other weights, nothing is learned."""
    source = make_source()
    source._introduced = False
    publishing.allowed.set()
    publishing.error = WeightsMismatchError("other start weights")
    with pytest.raises(WeightsMismatchError, match="other start weights"):
        source.publish(trained({"w": torch.ones(3)}), 0)
    source.close()


def test_a_checkpoint_keeps_canaries_and_statistics(publishing: Publishing) -> None:
    """Canaries of the versions in it, and of every reward how many scores there were, were missing, and their sum."""
    publishing.allowed.set()
    source, resumed = make_source(2), make_source(2)
    for version in range(5):
        source.publish(trained({"w": torch.ones(3)}), version)
        publishing.batch = RankBatch((), {}, {"clip": (3, 1, 0.5)})
        source._batch(version, 0, 1)
    state = json.loads(json.dumps(source.state_dict(4)))
    assert state["rewards"] == {"clip": [15, 5, 2.5]}
    resumed.load_state_dict(state)
    assert resumed.state_dict(4)["rewards"] == state["rewards"]
    assert resumed._canaries == dict.fromkeys((2, 3), Canary(0.1, known_kernels(torch.device("cpu"))))
    source.close()
    resumed.close()

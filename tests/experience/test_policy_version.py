"""Which weights an actor's policy holds, above all after a load that went wrong. Without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import GetTimeoutError

from actors.experience.policy import policy_version
from actors.experience.policy.canary import take_canary
from actors.experience.policy.policy_version import LoadedPolicy
from actors.experience.policy.weight_sync import WeightsMismatchError, fetch_weights, policy_checksum
from actors.messages import Arrays, Canary, PolicyWeights
from deepgen.models.unified import UnifiedModel
from tests.helpers.factories import make_tiny_folder, make_tiny_model
from tests.helpers.rl_world import make_settings


class World:
    """A policy in its weights folder, and three published versions: each is the one before, scaled."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_tiny_folder(folder / "model")
        settings = make_settings(folder)
        model = UnifiedModel.from_folder(folder / "model")
        weights = {name: parameter.detach() for name, parameter in model.trainable_parameters("rl")}
        self.versions: list[PolicyWeights] = []
        self.arrays: list[Arrays] = []
        for version in range(3):
            for tensor in weights.values():
                tensor.mul_(1 + 0.01 * version)
            self.arrays.append({name: tensor.clone().numpy() for name, tensor in weights.items()})
            canary, checksum = take_canary(model, settings.rollout), policy_checksum(version, weights.items())
            self.versions.append(PolicyWeights(version, checksum, tuple(weights), (), canary))
        monkeypatch.setattr(policy_version, "fetch_weights", lambda published, _: dict(self.arrays[published.version]))
        self.policy = LoadedPolicy(settings)

    def holds(self, version: int) -> bool:
        found = self.policy.sampler.trained_parameters()
        return all(torch.equal(found[name], torch.tensor(array)) for name, array in self.arrays[version].items())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_versions_come_and_go(world: World) -> None:
    for version in (0, 1, 2, 1, 0, 2):
        assert world.policy.use(world.versions[version]) == version
        assert world.holds(version)
    assert world.policy.use(None) == 0 and world.holds(0)


def test_the_checksum_is_that_of_what_is_held(world: World) -> None:
    """Groups drawn with the weights folder have the checksum of version 0: the journal takes them for the same."""
    world.policy.use(None)
    assert world.policy.checksum() == world.versions[0].checksum
    world.policy.use(world.versions[2])
    assert world.policy.checksum() == world.versions[2].checksum
    world.policy.use(None)
    assert world.policy.checksum() == world.versions[0].checksum


def test_after_a_mismatch_the_former_version_is_loaded_again(world: World) -> None:
    """It was overwritten before the mismatch was seen."""
    _, one, two = world.versions
    world.policy.use(one)
    with pytest.raises(WeightsMismatchError, match="version 2: the learner published checksum 0123"):
        world.policy.use(replace(two, checksum="0123"))
    assert not world.holds(1)
    assert world.policy.use(one) == 1 and world.holds(1)
    with pytest.raises(WeightsMismatchError, match="version 2: the learner's canary"):
        world.policy.use(replace(two, canary=one.canary))
    assert world.policy.use(None) == 0 and world.holds(0)


@pytest.mark.parametrize("where", ["prefetch", "use"])
def test_other_start_weights_than_the_learners_are_refused(world: World, where: str) -> None:
    other = replace(world.versions[0], canary=Canary(float("nan"), None))
    with pytest.raises(WeightsMismatchError, match="nan"):
        getattr(world.policy, where)(other)
    assert world.policy.use(world.versions[0]) == 0  # fetched, not believed


def test_an_evaluation_leaves_no_version_behind(world: World, tmp_path: Path) -> None:
    zero, one, _ = world.versions
    make_tiny_model(5).save_folder(tmp_path / "average")
    world.policy.use(one)
    world.policy.read(tmp_path / "average", None)
    assert not world.holds(1)
    assert world.policy.use(one) == 1 and world.holds(1)
    world.policy.read(tmp_path / "model", zero)
    assert world.holds(0)
    with pytest.raises(WeightsMismatchError, match="version 1"):
        world.policy.read(tmp_path / "model", one)  # the same folder, as another version
    assert world.policy.use(one) == 1 and world.holds(1)


def test_the_learner_sends_what_the_policy_trains_and_nothing_else(world: World) -> None:
    one, frozen = world.versions[1], "meta_queries"
    assert all(name.startswith("transformer.") for name in one.names)
    before = dict(world.policy.sampler.model.named_parameters())[frozen].clone()
    world.arrays[1][frozen] = before.numpy() + 1
    with pytest.raises(WeightsMismatchError, match=r"the learner sent all but \[\], and \['meta_queries'\] besides"):
        world.policy.use(replace(one, names=(*one.names, frozen)))
    assert torch.equal(dict(world.policy.sampler.model.named_parameters())[frozen], before)


def test_weights_of_which_ray_has_lost_the_answer_are_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[Any, float]] = []
    answers: dict[str, Any] = {"an object": ["anew"], "anew": {"w": np.ones(2, np.float32)}}

    def get(asked: Any, timeout: float) -> Any:
        waits.append((asked, timeout))
        if asked == ["lost"]:
            raise GetTimeoutError
        return answers[asked] if isinstance(asked, str) else [answers[one] for one in asked]

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "put", lambda refs: "an object")
    published = PolicyWeights(3, "", ("w",), ("lost",), Canary(0.0, None))
    assert fetch_weights(published, 240.0)["w"].tolist() == [1, 1]
    assert waits == [(["lost"], 20), ("an object", 220), (["anew"], 40)]
    waits.clear()
    answers["an object"] = ["lost"]
    with pytest.raises(GetTimeoutError):
        fetch_weights(published, 240.0)
    assert sum(timeout for asked, timeout in waits if isinstance(asked, list)) == 240

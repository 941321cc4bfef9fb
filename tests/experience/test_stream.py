"""The experience stream on a real local Ray, with a narrow random model and rewards that are visible in the image."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from actors.experience.policy.weight_sync import WeightsMismatchError
from actors.experience.prompt_order import PromptOrder
from actors.experience.reward_requests import request_key
from actors.experience.rollout_fleet import RolloutError, RolloutFleet
from actors.experience.stream import BatchLateError, ExperienceStream
from actors.messages import Canary, EvaluationRequest, Group, PolicyWeights, RankBatch
from actors.start import start_rollouts
from deepgen.config import Settings, UserError
from deepgen.data.images import decode_image
from deepgen.data.parquet import read_records
from deepgen.data.records import Record
from deepgen.drawing.request import DrawRequest
from tests.helpers.frail_actors import Deaf, Frail, Slow
from tests.helpers.lost_objects import lost_reference
from tests.helpers.published import publish
from tests.helpers.rl_world import PROMPTS, make_records, make_settings, make_world

pytestmark = pytest.mark.ray

Scenario = Callable[[ExperienceStream], Coroutine[Any, Any, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def rollouts(ray_local: ModuleType, world: Path) -> Iterator[dict[str, Any]]:
    actors = start_rollouts(make_settings(world), gpus=False)
    yield actors
    for actor in actors.values():
        ray_local.kill(actor)


def run(settings: Settings, actors: dict[str, Any], scenario: Scenario, *, resume: bool = False) -> Any:
    """Run a scenario in this process with a new, started stream."""

    async def body() -> Any:
        stream = ExperienceStream(settings, read_records(settings.data.prompts), actors, resume=resume)
        await stream.start()
        try:
            return await scenario(stream)
        finally:
            await stream.stop()

    return asyncio.run(body())


def numbers(batch: RankBatch) -> list[int]:
    return [group.number for group in batch.groups]


def arrays(ray: ModuleType, batch: RankBatch) -> list[dict[str, np.ndarray]]:
    return ray.get([group.trajectory for group in batch.groups])


def assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_every_prompt_comes_once_an_epoch_in_an_order_of_seed_and_epoch() -> None:
    records = make_records(PROMPTS, "p")
    order, again = PromptOrder(records, seed=1), PromptOrder(records, seed=1)
    drawn = [order.at(number) for number in range(3 * PROMPTS)]
    assert [epoch for epoch, _ in drawn] == [0] * PROMPTS + [1] * PROMPTS + [2] * PROMPTS
    epochs = [[record.id for _, record in drawn[e * PROMPTS : (e + 1) * PROMPTS]] for e in range(3)]
    assert all(sorted(ids) == sorted(record.id for record in records) for ids in epochs)
    assert epochs[0] != epochs[1]
    assert [again.at(number) for number in (13, 2, 7, 13)] == [drawn[number] for number in (13, 2, 7, 13)]
    assert PromptOrder(records, seed=2).fingerprint() != order.fingerprint()
    assert PromptOrder(records[:-1], seed=1).fingerprint() != order.fingerprint()


# -- one step --------------------------------------------------------------------------------------------------------


def test_a_step_is_sampled_scored_and_split(ray_local: ModuleType, world: Path, rollouts: dict[str, Any]) -> None:
    settings = make_settings(world, "train.workers=2", "rollout.prompts_per_step=4")

    async def scenario(stream: ExperienceStream) -> list[RankBatch]:
        await stream.begin()
        return list(await asyncio.gather(*(stream.next_batch(0, rank, 2) for rank in range(2))))

    first, second = run(settings, rollouts, scenario)
    assert (numbers(first), numbers(second)) == ([0, 2], [1, 3])
    advantages = np.stack([group.advantages for group in (*first.groups, *second.groups)])
    assert advantages.shape == (4, 4)
    assert advantages.mean() == pytest.approx(0, abs=1e-5)  # whitened over the whole batch, not over a rank's share
    assert advantages.std(ddof=1) == pytest.approx(1, abs=1e-2)
    assert abs(first.groups[0].advantages.mean()) < 1e-5  # each reward is normalised within its group
    metrics = first.metrics
    assert metrics["reward_missing/aesthetic"] == 0
    assert 0 < metrics["reward/aesthetic"] < 1
    assert metrics["pool/aesthetic/missing"] == 0
    (packed, *_) = arrays(ray_local, first)
    assert packed["trajectory/log_probs"].shape == (2, 4)
    assert packed["trajectory/log_probs"].dtype == np.float32
    assert packed["conditioning/context"].shape[0] == 1


def test_rewards_are_routed_and_a_missing_score_is_not_zero(world: Path, rollouts: dict[str, Any]) -> None:
    """Redness applies only to red t2i prompts, and gives no score for the unreadable one."""
    records = [
        replace(record, prompt="a red unreadable thing") if record.id == "rl-1" else record
        for record in make_records(PROMPTS, "rl")
    ]
    settings = make_settings(world, f"rollout.prompts_per_step={PROMPTS}")

    async def body() -> RankBatch:
        stream = ExperienceStream(settings, records, rollouts, resume=False)
        await stream.start()
        try:
            await stream.begin()
            return await stream.next_batch(0, 0, 1)
        finally:
            await stream.stop()

    batch = asyncio.run(body())
    red = [r for r in records if r.task == "t2i" and "red" in r.prompt]
    assert batch.metrics["reward_missing/clip"] == 4
    assert batch.tally["clip"][:2] == (4 * (len(red) - 1), 4)
    assert batch.metrics["reward/clip"] > 0.1  # the mean of what exists
    assert batch.metrics["reward_missing/aesthetic"] == 0
    assert all(np.isfinite(group.advantages).all() for group in batch.groups)


def test_a_group_comes_when_it_is_scored(ray_local: ModuleType, world: Path, rollouts: dict[str, Any]) -> None:
    """Before its step is complete, with its own part of the advantages; the step then gives the factor for the rest."""
    settings = make_settings(world, "rollout.prompts_per_step=4", "experience.overlap=on")

    async def scenario(stream: ExperienceStream) -> tuple[list[Group], int, RankBatch]:
        await stream.begin()
        first = await stream.next_group(0, 0)
        missing = sum(not group.done() for group in stream._steps[0].groups)
        groups = [first, *[await stream.next_group(0, position) for position in (1, 2, 3)]]
        return groups, missing, await stream.next_batch(0, 0, 1)

    groups, missing, batch = run(settings, rollouts, scenario)
    assert missing > 0
    assert [group.number for group in groups] == numbers(batch)
    for one, whole in zip(groups, batch.groups, strict=True):
        assert one.trajectory == whole.trajectory
        np.testing.assert_allclose(one.advantages * batch.factor, whole.advantages, rtol=1e-5, atol=1e-6)
    assert batch.clamped == 0


def test_any_actor_draws_the_same_group(ray_local: ModuleType, world: Path, rollouts: dict[str, Any]) -> None:
    record = read_records(make_settings(world).data.prompts)[2]
    assert record.task == "edit"
    request = Group(number=2, step=0, epoch=0, record=record)
    drawn = [
        ray_local.get(list(actor.sample_group.options(num_returns=3).remote(request, None, record.references)))
        for actor in (*rollouts.values(), *rollouts.values())
    ]
    for group, requests, packed in drawn:
        assert group.keys == drawn[0][0].keys == tuple(map(request_key, requests))
        assert all(np.array_equal(r.references[0], decode_image(record.references[0])) for r in requests)
        assert_same([packed], [drawn[0][2]])
    other = Group(number=8, step=0, epoch=1, record=record)
    group, *_ = ray_local.get(
        list(rollouts["rollout-0"].sample_group.options(num_returns=3).remote(other, None, record.references))
    )
    assert not set(group.keys) & set(drawn[0][0].keys)


# -- versions --------------------------------------------------------------------------------------------------------


def policy(world: Path, version: int, scale: float = 1.0) -> PolicyWeights:
    """A published version: the world's model with its trainable weights scaled."""
    return publish(make_settings(world), version, scale)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_step_waits_until_the_policy_is_fresh_enough(world: Path, rollouts: dict[str, Any], staleness: int) -> None:
    settings = make_settings(world, f"experience.max_staleness={staleness}", "experience.deadline_s=60")

    async def scenario(stream: ExperienceStream) -> tuple[RankBatch, list[int], RankBatch]:
        await stream.begin()
        await stream.publish(policy(world, 0))
        first = await stream.next_batch(0, 0, 1)
        begun = sorted((await stream.state(1))["in_flight"])
        await stream.publish(policy(world, 1, 1.01))
        return first, begun, await stream.next_batch(1, 0, 1)

    first, begun, second = run(settings, rollouts, scenario)
    assert {group.version for group in first.groups} == {0}
    assert begun == ([1] if staleness else [])
    assert all(1 - group.version <= staleness for group in second.groups)
    if not staleness:
        assert {group.version for group in second.groups} == {1}
    assert numbers(second) == [2, 3]


def test_an_actor_that_starts_again_compares_its_start_weights(
    ray_local: ModuleType, world: Path, rollouts: dict[str, Any]
) -> None:
    """Its groups of step 0 were begun before the learner published version 0; they are sent to it after that."""

    async def scenario(stream: ExperienceStream) -> None:
        await stream.begin()
        await stream.publish(policy(world, 0))
        waiting = stream._groups(0)[0]
        await stream._generate(waiting, None)
        stream._policies[0] = replace(policy(world, 0), checksum="0123")
        await stream._generate(waiting, None)

    with pytest.raises(WeightsMismatchError, match="published checksum 0123"):
        run(make_settings(world), rollouts, scenario)


def test_published_weights_must_arrive_as_they_left(world: Path, rollouts: dict[str, Any]) -> None:
    async def scenario(stream: ExperienceStream) -> None:
        published = policy(world, 7, 1.1)
        await stream.publish(replace(published, checksum="0123"))
        await stream.next_batch(7, 0, 1)

    with pytest.raises(WeightsMismatchError, match=r"published checksum 0123, but the rollout policy has [0-9a-f]{32}"):
        run(make_settings(world, "train.steps=9"), rollouts, scenario, resume=True)


# -- failures --------------------------------------------------------------------------------------------------------


def test_the_group_of_a_dead_actor_is_drawn_again(ray_local: ModuleType, world: Path, rollouts: dict[str, Any]) -> None:
    settings = make_settings(world)
    weights = policy(world, 0)

    async def undisturbed(stream: ExperienceStream) -> RankBatch:
        await stream.publish(weights)
        return await stream.next_batch(0, 0, 1)

    async def disturbed(stream: ExperienceStream) -> RankBatch:
        await stream.publish(weights)
        ray_local.kill(rollouts["rollout-1"], no_restart=False)
        return await stream.next_batch(0, 0, 1)

    calm, rough = run(settings, rollouts, undisturbed), run(settings, rollouts, disturbed)
    assert numbers(calm) == numbers(rough)
    assert_same(arrays(ray_local, calm), arrays(ray_local, rough))
    for one, other in zip(calm.groups, rough.groups, strict=True):
        assert np.array_equal(one.advantages, other.advantages)


def losing(stream: ExperienceStream, times: int) -> None:
    """Let the images of the next `times` groups be lost before they are scored."""
    generate, lost = stream._generate, [lost_reference()] * times

    async def drawn_and_lost(asked: Group, policy: PolicyWeights | None) -> Group:
        drawn = await generate(asked, policy)
        return replace(drawn, requests=lost.pop()) if lost else drawn

    stream._generate = drawn_and_lost  # type: ignore[method-assign]


def test_a_group_whose_images_are_lost_is_drawn_again(
    ray_local: ModuleType, world: Path, rollouts: dict[str, Any]
) -> None:
    async def step(stream: ExperienceStream, lost: int) -> RankBatch:
        losing(stream, lost)
        await stream.begin()
        return await stream.next_batch(0, 0, 1)

    settings = make_settings(world)
    calm, rough = (run(settings, rollouts, functools.partial(step, lost=lost)) for lost in (0, 2))
    assert_same(arrays(ray_local, calm), arrays(ray_local, rough))
    for one, other in zip(calm.groups, rough.groups, strict=True):
        assert np.array_equal(one.scores, other.scores, equal_nan=True)
    with pytest.raises(RolloutError, match=r"group \d of step 0 \(prompt 'rl-\d'\): its images were lost 3 times"):
        run(settings, rollouts, functools.partial(step, lost=6))


def call_once(ray: ModuleType, kind: type, call_deadline_s: float) -> None:
    async def body() -> None:
        actor = ray.remote(kind).options(num_cpus=0.1, max_restarts=1).remote()
        fleet = RolloutFleet({"only": actor}, call_deadline_s=call_deadline_s, start_deadline_s=200)
        await fleet.start()
        await fleet.call("sample_group", "group 5", lambda: None)

    asyncio.run(body())


def test_a_late_batch_names_actor_call_and_age(ray_local: ModuleType, world: Path) -> None:
    settings = make_settings(world, "experience.deadline_s=2")
    slow = {"slow": ray_local.remote(Slow).options(num_cpus=0.1).remote()}

    async def scenario(stream: ExperienceStream) -> None:
        stream._fleet._call_deadline_s = 100
        await stream.begin()
        await stream.next_batch(0, 0, 1)

    wanted = (
        r"batch of step 0 not ready after 2 s; actor slow, call sample_group of group 0 of step 0 .*running for 2 s"
    )
    with pytest.raises(BatchLateError, match=wanted):
        run(settings, slow, scenario)
    ray_local.kill(slow["slow"])


def test_a_call_that_hangs_is_tried_again_and_then_given_up(ray_local: ModuleType) -> None:
    late = r"no rollout actor is left; actor only, call sample_group, after \d s: no answer within the deadline"
    with pytest.raises(RolloutError, match=late):
        call_once(ray_local, Slow, call_deadline_s=0.5)


def test_an_actor_that_does_not_fetch_weights_does_not_end_the_run(ray_local: ModuleType) -> None:
    """It is started again. The next call is answered, by the old process if that still lives, or by the new one."""
    actor = ray_local.remote(num_cpus=0.1, max_restarts=1, concurrency_groups={"weights": 1})(Deaf).remote()

    async def body() -> tuple[int, int]:
        fleet = RolloutFleet({"only": actor}, call_deadline_s=0.2, start_deadline_s=200)
        await fleet.start()
        first: int = await actor.process.remote()
        await fleet.prefetch(PolicyWeights(2, "", (), (), Canary(0.0, None)))
        fleet._call_deadline_s = 100
        await fleet.call("sample_group", "group 5", lambda: None)
        return first, fleet.restarts

    (first, restarts), end = asyncio.run(body()), time.monotonic() + 60
    assert restarts >= 1
    while (process := process_of(ray_local, actor)) in (first, None) and time.monotonic() < end:
        time.sleep(0.1)
    assert process not in (first, None)
    ray_local.kill(actor)


def process_of(ray: ModuleType, actor: Any) -> int | None:
    """Its process's number, None while it has none."""
    try:
        number: int = ray.get(actor.process.remote(), timeout=60)
    except ray.exceptions.RayActorError:
        return None
    return number


def test_a_fleet_that_is_gone_says_so(ray_local: ModuleType) -> None:
    gone = r"no rollout actor is left; actor only, call sample_group, after \d+ s: .*; actor only, call ready, after"
    with pytest.raises(RolloutError, match=gone):
        call_once(ray_local, Frail, call_deadline_s=60)


# -- state -----------------------------------------------------------------------------------------------------------


def whole_and_resumed(
    world: Path, rollouts: dict[str, Any], *more: str, republished: range
) -> tuple[RankBatch, RankBatch, dict[str, Any]]:
    """Step 2 of a stream, the same step of one restored before it, and the state it was restored from."""
    settings = make_settings(world, *more)
    weights = [policy(world, version, 1 + version / 100) for version in range(3)]

    async def whole(stream: ExperienceStream) -> tuple[RankBatch, dict[str, Any]]:
        await stream.begin()
        for version in (0, 1):
            await stream.publish(weights[version])
            await stream.next_batch(version, 0, 1)
        await stream.publish(weights[2])
        state = await stream.state(2)
        return await stream.next_batch(2, 0, 1), state

    async def resumed(stream: ExperienceStream) -> RankBatch:
        await stream.restore(json.loads(json.dumps(state)))
        for version in republished:
            await stream.publish(weights[version])
        return await stream.next_batch(2, 0, 1)

    expected, state = run(settings, rollouts, whole)
    return expected, run(settings, rollouts, resumed, resume=True), state


def test_a_restored_stream_goes_on_with_the_next_prompts(
    ray_local: ModuleType, world: Path, rollouts: dict[str, Any]
) -> None:
    expected, batch, state = whole_and_resumed(world, rollouts, republished=range(2, 3))
    assert state["cursor"] == {"group": 4, "epoch": 0, "position": 4}
    assert numbers(batch) == numbers(expected) == [4, 5]
    assert_same(arrays(ray_local, batch), arrays(ray_local, expected))
    assert batch.metrics["reward/aesthetic"] == expected.metrics["reward/aesthetic"]


def test_a_restored_stale_stream_draws_with_the_version_before(
    ray_local: ModuleType, world: Path, rollouts: dict[str, Any]
) -> None:
    """At max_staleness 1, step 2 is drawn with version 1. The learner publishes it again out of the checkpoint."""
    stale = "experience.max_staleness=1"
    expected, batch, _ = whole_and_resumed(world, rollouts, stale, republished=range(1, 3))
    assert {group.version for group in (*expected.groups, *batch.groups)} == {1}
    assert numbers(batch) == numbers(expected) == [4, 5]
    assert_same(arrays(ray_local, batch), arrays(ray_local, expected))


def test_a_restored_stream_serves_another_number_of_ranks(
    ray_local: ModuleType, world: Path, rollouts: dict[str, Any]
) -> None:
    """1 -> 2 -> 1 ranks: the same groups with the same advantages, each to one rank."""
    weights = [policy(world, version, 1 + version / 100) for version in range(3)]

    def go_on(ranks: int, state: dict[str, Any] | None, steps: range) -> list[tuple[dict[str, Any], list[RankBatch]]]:
        """The state before each step, and the step's batches."""

        async def scenario(stream: ExperienceStream) -> list[tuple[dict[str, Any], list[RankBatch]]]:
            found = []
            if state is not None:
                await stream.restore(json.loads(json.dumps(state)))
            for step in steps:
                await stream.publish(weights[step])
                before = json.loads(json.dumps(await stream.state(step)))
                batches = await asyncio.gather(*(stream.next_batch(step, rank, ranks) for rank in range(ranks)))
                found.append((before, list(batches)))
            return found

        settings = make_settings(world, f"train.workers={ranks}", "train.steps=3")
        return run(settings, rollouts, scenario, resume=state is not None)

    def groups(batches: list[RankBatch]) -> list[tuple[int, list[float]]]:
        return sorted((group.number, group.advantages.tolist()) for batch in batches for group in batch.groups)

    one = go_on(1, None, range(2))
    two = go_on(2, one[1][0], range(1, 3))
    assert [len(batch.groups) for batch in two[0][1]] == [1, 1]
    assert groups(two[0][1]) == groups(one[1][1])
    by_number = {group.number: ray_local.get(group.trajectory) for batch in two[0][1] for group in batch.groups}
    assert_same([by_number[group.number] for group in one[1][1][0].groups], arrays(ray_local, one[1][1][0]))
    again = go_on(1, two[1][0], range(2, 3))
    assert groups(again[0][1]) == groups(two[1][1])
    assert again[0][1][0].tally == two[1][1][0].tally == two[1][1][1].tally


def test_restoring_with_other_prompts_is_refused(world: Path) -> None:
    settings = make_settings(world)

    async def body() -> None:
        state = await ExperienceStream(settings, make_records(PROMPTS, "rl"), {}, resume=False).state(1)
        await ExperienceStream(settings, make_records(PROMPTS, "other"), {}, resume=True).restore(state)

    with pytest.raises(UserError, match=r"data\.prompts: other prompts"):
        asyncio.run(body())


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_an_evaluation_is_the_same_however_it_is_batched(
    ray_local: ModuleType, world: Path, rollouts: dict[str, Any]
) -> None:
    heldout = read_records(make_settings(world).data.heldout)
    actor = rollouts["rollout-0"]

    def drawn(*records: Record) -> list[np.ndarray]:
        call = actor.evaluate.options(num_returns=2).remote(
            EvaluationRequest(DrawRequest(records, (0, 1), 5, 64, 4, 3.0)), None
        )
        return [request.image for request in ray_local.get(call[1])]

    together, alone = drawn(*heldout), [image for record in heldout for image in drawn(record)]
    for one, other in zip(together, alone, strict=True):
        assert one.shape == (64, 64, 3)
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert not any(np.array_equal(one, other) for one, other in zip(together[::2], together[1::2], strict=True))


def test_evaluation_scores_by_prompt(world: Path, rollouts: dict[str, Any]) -> None:
    settings = make_settings(world)
    heldout = read_records(settings.data.heldout)

    async def scenario(stream: ExperienceStream) -> tuple[Any, Any]:
        return await stream.evaluate(heldout, 2), await stream.evaluate(heldout, 2)

    first, second = run(settings, rollouts, scenario)
    names = list(first.names)
    assert names == ["clip", "aesthetic"]
    assert first.scores.shape == (4, 2, 2)
    assert np.array_equal(first.scores, second.scores, equal_nan=True)
    asked = first.reward_weights > 0
    assert asked[:, names.index("clip")].tolist() == [False, True, False, True]
    assert np.isfinite(first.scores).all(axis=1)[asked].all()
    assert np.isnan(first.scores[:, :, names.index("clip")][0]).all()
    assert set(first.means()) == {"clip", "aesthetic", "total"}

"""The experience stream: prompts in, batches with advantages out. One async Ray actor, the only owner of RL state.

The path of a group: the stream admits a prompt when the policy is fresh enough, and a rollout actor samples it. All its
rewards score it in parallel, while other groups are still being sampled. When the whole step is scored, the stream
computes all advantages together and splits them over the learner's ranks. This process moves references and numbers:
images stay in the object store until the rewards read them, trajectories until a rank does. A group whose images are
lost with their node is drawn again.

Left out: dropping samples (the admission rule bounds staleness), and batches that mix steps.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from actors.experience.journal.journal_counts import JournalCounts
from actors.experience.prompt_order import PromptOrder, check_state
from actors.experience.rollout_actor import Pictures
from actors.experience.rollout_fleet import ATTEMPTS, RolloutError, RolloutFleet, draining_nodes
from actors.experience.scoring.pool_parts import RequestsLostError, RewardPoolError
from actors.experience.scoring.replica import CallTimeout, Replica
from actors.experience.scoring.reward_router import RewardRouter
from actors.experience.step_advantages import factor_and_clamped, own_advantages, step_advantages
from actors.experience.step_metrics import StepClock, held_out_metrics, stacked_scores, step_metrics
from actors.experience.stream_client import StreamForgotError, VersionGoneError
from actors.experience.watch import Watch
from actors.messages import EvaluationReply, EvaluationRequest, Group, PolicyWeights, RankBatch
from deepgen.config import Settings
from deepgen.data.records import Record
from deepgen.data.usable import usable_records
from deepgen.drawing.request import DrawRequest
from deepgen.errors import UserError
from deepgen.evaluation.results import Evaluation
from deepgen.monitoring.log_lines import Speaker, set_up_logs
from deepgen.tracking.timeline import Recorder
from rewards import RewardRequest

if TYPE_CHECKING:
    from deepgen.algorithms.advantages import AdvantageResult

log = logging.getLogger(__name__)

T = TypeVar("T")

_EVALUATION_IMAGES = 16  # images per evaluation call
_GRACE_S = 5.0  # for a pool that is not ready in time to say so itself


class BatchLateError(RuntimeError):
    """A step's batch missed its deadline. The message names the longest-running call and its age."""


class ExperienceStream:
    """See the module. With `resume`, no step begins before `publish`.

    records: the prompts; None: the usable ones of data.prompts. actors: rollout actors by name, each as its handle or
    its name in Ray. recorder: of the calls; None for one that writes the run's timeline, with a status beside it.
    replica: makes the replicas of the reward pools.
    """

    def __init__(
        self,
        settings: Settings,
        records: Sequence[Record] | None,
        actors: dict[str, Any],
        *,
        resume: bool,
        gpus: bool = False,
        recorder: Recorder | None = None,
        replica: Callable[..., Replica] = Replica,
    ) -> None:
        set_up_logs(Speaker("stream", run=settings.run.name))
        self._settings = settings
        if records is None:
            records = [record for _, record in usable_records(settings, "data.prompts", say=log.warning)]
        self._prompts = PromptOrder(records, settings.run.seed)
        self._watched = recorder is None
        recorder = recorder or Recorder(settings.run.folder, "stream")
        self._clock = recorder.clock
        self._fleet = RolloutFleet(
            {name: ray.get_actor(actor) if isinstance(actor, str) else actor for name, actor in actors.items()},
            call_deadline_s=settings.experience.deadline_s / ATTEMPTS,
            start_deadline_s=settings.cluster.start_deadline_s,
            least=min(settings.rollout.least_actors, len(actors)),
            draining=draining_nodes if self._watched else None,
            recorder=recorder,
        )
        self._rewards = RewardRouter(settings, gpus=gpus, recorder=recorder, replica=replica)
        self._watch = Watch(settings, recorder, self._fleet, self._rewards)
        self._pictures: dict[Pictures, ray.ObjectRef] = {}  # an edit's source pictures, in the object store
        self._version: int | None = None if resume else 0  # the newest
        # Versions that steps may still be drawn with; None: the weights folder, which is version 0.
        self._policies: dict[int, PolicyWeights | None] = {} if resume else {0: None}
        self._published = asyncio.Condition()
        self._next_step = 0  # first step that no rank has fetched yet
        self._steps: dict[int, _Step] = {}
        self._sync_seconds = 0.0
        self._journal = JournalCounts()
        self._learner = ""  # the start of the learner that has published last
        self._starting: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Wait until rollout actors and reward pools are ready. Every call does this first, as Ray may have started the
        stream again before it. Returns early, and without an error, if `stop` is called meanwhile.

        Raises TimeoutError after cluster.start_deadline_s, and UserError that names a reward that is not ready then, or
        cannot score.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        deadline = self._settings.cluster.start_deadline_s
        if self._watched:
            self._watch.start(lambda: self._version)
        try:
            parts = self._fleet.start(), self._rewards.start(), asyncio.to_thread(_import_libraries)
            await asyncio.wait_for(asyncio.gather(*parts), deadline + _GRACE_S)
        except CallTimeout as error:
            raise UserError(
                f"cluster.start_deadline_s: {error}; it is not placed, or still loading; allowed: more seconds"
            ) from error
        except RewardPoolError as error:
            if not self._stopped:  # else nobody waits any more, and Ray would print the error
                raise UserError(f"rewards: {error}") from error
        except TimeoutError as error:
            raise TimeoutError(f"rollout actors and reward pools were not ready within {deadline:.0f} s") from error

    async def begin(self) -> None:
        """Start sampling the first steps. A resumed stream waits for `publish` instead."""
        self._schedule_steps()

    async def stop(self) -> None:
        """Stop the reward pools and cancel unfinished steps. The rollout actors keep running."""
        version, self._stopped = self._version, True
        await self._rewind(self._next_step)
        await self._watch.stop(version)
        self._rewards.stop()
        self._fleet.stop()
        await asyncio.sleep(0)  # lets the cancelled tasks of both end

    # -- one step: generate -> score -> advantage --------------------------------------------------------------------

    async def next_batch(self, step: int, rank: int, world: int, learner: str = "") -> RankBatch:
        """This rank's share of a step. The step is sampled and scored once for all ranks.

        `learner`: as in `publish`. Raises StreamForgotError if another one, or none, has published.
        """
        await self._known(learner)
        if world != self._settings.train.workers:
            raise ValueError(f"{world} ranks ask for batches that were planned for {self._settings.train.workers}")
        self._watch.asked(step, rank)
        self._consume(step)
        batch: RankBatch = (await self._in_time(self._steps[step].batches, f"batch of step {step}"))[rank]
        return replace(batch, metrics=batch.metrics | self._watch.handed_out(step, rank))

    async def next_group(self, step: int, position: int, learner: str = "") -> Group:
        """Group `position` of a step as soon as it is scored, with its own part of the advantages."""
        await self._known(learner)
        rank = position % self._settings.train.workers
        self._watch.asked(step, rank)
        self._consume(step)
        group: Group = await self._in_time(self._steps[step].groups[position], f"group {position} of step {step}")
        self._watch.got(step, rank)
        return replace(group, advantages=own_advantages(self._settings, group))

    async def draw_again(self, step: int, number: int, learner: str = "") -> list[Any]:
        """A reference to the trajectory of a group whose first one is lost, in a list. It has the same bits."""
        await self._known(learner)
        (asked,) = (group for group in self._groups(step) if group.number == number)
        drawn = await self._generate(asked, await self._policy(self._version_of(step)))
        return [drawn.trajectory]

    async def _known(self, learner: str) -> None:
        await self.start()
        if learner != self._learner:
            raise StreamForgotError("the stream has started again; publish the versions that it needs")

    async def make_step(self, groups: Sequence[asyncio.Task[Group]], clock: StepClock) -> list[RankBatch]:
        scored = await asyncio.gather(*groups)
        reward_weights = np.stack([group.reward_weights for group in scored])  # [groups, K]
        return self._split(scored, reward_weights, step_advantages(self._settings, scored), clock)

    async def _make_group(self, asked: Group, clock: StepClock) -> Group:
        policy = await self._policy(self._version_of(asked.step))

        async def once() -> Group:
            drawn = await self._generate(asked, policy)
            clock.sampled()
            return await self._score(drawn)

        clock.begun()
        scored = await _again_if_lost(str(asked), once)
        clock.scored()
        return scored

    async def _generate(self, asked: Group, policy: PolicyWeights | None) -> Group:
        drawn: Group
        light = replace(asked, record=replace(asked.record, image=None, references=()))
        sources = self._sources(asked.record)
        known = functools.partial(self._known_now, self._version_of(asked.step), policy)
        drawn, requests, trajectory = await self._fleet.call("sample_group", light, known, *sources, outputs=3)
        self._journal.add(drawn.journal)
        return replace(drawn, journal=None, requests=requests, trajectory=trajectory)

    def _sources(self, record: Record) -> list[ray.ObjectRef]:
        """The source pictures of an edit, as the last argument of `sample_group`. They enter the object store once."""
        if not record.references:
            return []
        if record.references not in self._pictures:
            self._pictures[record.references] = ray.put(record.references)
        return [self._pictures[record.references]]

    async def _score(self, drawn: Group) -> Group:
        weights = np.tile(drawn.asked_weights, (len(drawn.keys), 1))
        scores = await self._rewards.score(drawn.requests, drawn.keys, weights)
        return replace(drawn, requests=None, keys=None, scores=scores)

    def _split(
        self, groups: Sequence[Group], reward_weights: np.ndarray, result: AdvantageResult, clock: StepClock
    ) -> list[RankBatch]:
        """Deal the groups out to the ranks in turn; every rank gets equally many."""
        advantages = result.advantages.reshape(len(groups), -1).numpy()
        ready = [replace(group, advantages=row.copy()) for group, row in zip(groups, advantages, strict=True)]
        metrics, tally = step_metrics(groups, reward_weights, self._rewards.names, result)
        metrics |= held_out_metrics(groups, self._rewards.names)
        metrics |= clock.metrics(stacked_scores(groups)[..., 0].size) | self._rewards.counters()
        metrics |= {"time/sync_s": self._sync_seconds, "rollout/restarts": float(self._fleet.restarts)}
        metrics["rollout/actors"] = float(self._fleet.working)
        metrics |= self._journal.metrics()
        world = self._settings.train.workers
        factor, clamped = factor_and_clamped(self._settings, advantages, result.factor)
        return [RankBatch(tuple(ready[rank::world]), metrics, tally, factor, clamped) for rank in range(world)]

    # -- admission ---------------------------------------------------------------------------------------------------

    def _groups(self, step: int) -> list[Group]:
        count = self._settings.rollout.prompts_per_step
        numbers = range(step * count, (step + 1) * count)
        return [Group(number, step, *self._prompts.at(number)) for number in numbers]

    def _version_of(self, step: int) -> int:
        return version_of(step, self._settings.experience.max_staleness)

    async def _policy(self, version: int) -> PolicyWeights | None:
        """A version of the policy, once it has been published. Raises VersionGoneError if only newer ones are there."""
        async with self._published:
            await self._published.wait_for(lambda: version in self._policies or version < (self._version or 0))
        if version not in self._policies:
            raise VersionGoneError(f"policy version {version} is gone; there is {sorted(self._policies)}")
        return self._policies[version]

    def _known_now(self, version: int, policy: PolicyWeights | None) -> PolicyWeights | None:
        """`policy`, or what has been published as this version since: version 0 is drawn with before that."""
        return policy or self._policies.get(version)

    def _schedule_steps(self) -> None:
        """Start every step whose policy has been published."""
        for step in range(self._next_step, self._settings.train.steps):
            if self._version_of(step) not in self._policies:
                break
            self._begin_step(step)

    def _begin_step(self, step: int) -> None:
        if step not in self._steps:
            clock = self._watch.step(step)
            groups = [asyncio.create_task(self._make_group(group, clock)) for group in self._groups(step)]
            self._steps[step] = _Step(groups, asyncio.create_task(self.make_step(groups, clock)))

    def _forget_policies(self) -> None:
        """Let go of versions that no step is drawn with any more. A step that a rank has asked for may still be."""
        oldest = self._version_of(min([self._next_step, *self._steps]))
        self._policies = {v: p for v, p in self._policies.items() if v >= oldest or v == self._version}

    def _consume(self, step: int) -> None:
        self._begin_step(step)
        for done in [number for number in self._steps if number < step]:
            del self._steps[done]  # every rank has it: a rank asks for a step after updating on the one before
        self._next_step = step + 1
        self._forget_policies()

    async def _in_time(self, task: asyncio.Task[Any], what: str) -> Any:
        deadline, begin = self._settings.experience.deadline_s, self._clock()
        try:
            return await asyncio.wait_for(asyncio.shield(task), deadline)
        except TimeoutError as error:
            if self._clock() - begin < deadline:
                raise  # not our deadline: a reward pool raised it
            waiting = self._fleet.oldest_call()
            raise BatchLateError(f"{what} not ready after {deadline:.0f} s; {waiting}") from error

    # -- policy versions ---------------------------------------------------------------------------------------------

    async def publish(
        self,
        published: PolicyWeights,
        step: int | None = None,
        learner: str = "",
        earlier: Sequence[PolicyWeights] = (),
    ) -> None:
        """Send a policy version to the rollout actors and start the steps that waited for it.

        step: the learner's next one, if that is not the version's number. learner: names one start of the learner; a
        new one begins anew with what it publishes. earlier: older versions that steps are still drawn with; a stream
        that has started again does not know them.
        """
        await self.start()
        begin, step = self._clock(), published.version if step is None else step
        if learner != self._learner:
            if self._learner:
                await self._rewind(step)
            self._learner = learner
        new = [one for one in (*earlier, published) if self._policies.get(one.version) != one]
        for one in new:
            await self._fleet.prefetch(one)
        self._next_step = max(self._next_step, step)
        async with self._published:
            self._policies |= {one.version: one for one in new}
            self._version = max(self._version or 0, published.version)
            self._published.notify_all()
        self._schedule_steps()
        self._forget_policies()
        self._sync_seconds = self._clock() - begin

    async def _rewind(self, step: int) -> None:
        tasks = [task for under_way in self._steps.values() for task in (*under_way.groups, under_way.batches)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._steps, self._next_step = {}, step
        self._policies, self._version = {}, None

    # -- evaluation --------------------------------------------------------------------------------------------------

    async def evaluate(
        self,
        records: Sequence[Record],
        samples: int,
        *,
        version: int | None = None,
        folder: Path | None = None,
        averaged: bool = False,
    ) -> Evaluation:
        """Draw and score held-out prompts with a policy version, as the section evaluation says.

        Waits until `version` has been published; None is the newest that there is now, 0 is the weights folder.

        With `folder`, the policy is loaded from this component folder instead. If `version` is still there, the folder
        must hold it, unless `averaged` says that it holds averaged weights.
        """
        await self.start()
        deadline_s = self._settings.experience.deadline_s
        per_call = max(1, _EVALUATION_IMAGES // samples)
        parts = [tuple(records[i : i + per_call]) for i in range(0, len(records), per_call)]
        version = (self._version or 0) if version is None else version
        # For all parts, however long some of them wait. Version 0 can be read from its folder at any time.
        policy = self._policies.get(version) if folder or version == 0 else await self._policy(version)

        async def one(part: tuple[Record, ...]) -> tuple[EvaluationReply, np.ndarray, list[np.ndarray]]:
            drawing = DrawRequest.of_evaluation(self._settings, part, samples)
            request = EvaluationRequest(drawing, folder, averaged)
            reply: EvaluationReply
            known = functools.partial(self._known_now, version, policy)
            reply, requests = await self._fleet.call("evaluate", request, known, outputs=2)
            weights = np.repeat(reply.reward_weights + reply.held_out_weights, samples, axis=0)
            scores = await self._rewards.score(requests, reply.keys, weights, samples)
            images = [request.image for request in await _read(requests, f"images of the {request}", deadline_s)]
            return reply, scores, [np.stack(images[i : i + samples]) for i in range(0, len(images), samples)]

        drawn = await asyncio.gather(
            *(_again_if_lost("a part of an evaluation", functools.partial(one, part)) for part in parts)
        )
        return Evaluation(
            records=tuple(records),
            images=tuple(image for _, _, images in drawn for image in images),
            names=self._rewards.names,
            scores=np.concatenate([scores for _, scores, _ in drawn]).reshape(len(records), samples, -1),
            reward_weights=np.concatenate([reply.reward_weights for reply, _, _ in drawn]),
            version=version,
            held_out_weights=np.concatenate([reply.held_out_weights for reply, _, _ in drawn]),
        )

    # -- state -------------------------------------------------------------------------------------------------------

    async def state(self, step: int) -> dict[str, Any]:
        """JSON-able state before `step`. A resumed stream samples everything else again."""
        number = step * self._settings.rollout.prompts_per_step
        epoch, position = divmod(number, len(self._prompts.records))
        return {
            "step": step,
            "cursor": {"group": number, "epoch": epoch, "position": position},
            "prompts": self._prompts.fingerprint(),
            "version": self._version,
            "in_flight": sorted(self._steps.keys() - range(step)),
        }

    async def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. Raises UserError if the run's prompts have changed since then."""
        check_state(self._settings, self._prompts.records, state)
        await self._rewind(state["step"])


class _Step(NamedTuple):
    """A step under way: its groups, in the order in which the learner takes them, and what comes of them all."""

    groups: list[asyncio.Task[Group]]
    batches: asyncio.Task[list[RankBatch]]


def version_of(step: int, max_staleness: int) -> int:
    """The policy version that draws the groups of a training step.

    It is a function of the step alone, whoever draws a group and whenever: a run's result does not depend on timing.
    """
    return max(0, step - max_staleness)


async def _read(requests: ray.ObjectRef, what: str, deadline_s: float) -> list[RewardRequest]:
    try:
        listed: list[RewardRequest] = await asyncio.wait_for(requests, deadline_s)
    except TimeoutError as error:
        raise TimeoutError(f"{what}: not readable within {deadline_s:.0f} s") from error
    except ObjectLostError as error:
        raise RequestsLostError(f"{what}: {error}") from error
    return listed


async def _again_if_lost(what: str, make: Callable[[], Awaitable[T]]) -> T:
    """The result of `make`, which draws images and has them scored. They are drawn again if they died with their node.

    The same bits come out. Raises RolloutError after ATTEMPTS losses.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await make()
        except RequestsLostError as error:
            log.warning("%s: its images are lost (attempt %d of %d): %s", what, attempt, ATTEMPTS, error)
            last = error
    raise RolloutError(f"{what}: its images were lost {ATTEMPTS} times") from last


def _import_libraries() -> None:
    """Spend the seconds of import while the models load, instead of when the first scores arrive."""
    import deepgen.algorithms.advantages  # noqa: F401

"""Turns experience into batches for the learner, and sends the learner's weights back to the stream."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError

from actors.experience.journal.group_journal import forget_groups
from actors.experience.policy.canary import canary_log_prob, known_kernels
from actors.experience.policy.weight_sync import fetch_weights
from actors.experience.rollout_fleet import ATTEMPTS
from actors.experience.stream_client import StreamClient, StreamForgotError
from actors.learner.checkpoints.checkpoint_shards import ShardReader, write_shard
from actors.learner.checkpoints.checkpoint_store import CheckpointStore
from actors.learner.collectives import gather
from actors.learner.protocols import Arriving, TrainedModel, WorkerContext
from actors.messages import Arrays, Canary, Group, PolicyWeights, RankBatch
from actors.objectives.publisher import Publisher
from actors.objectives.record_source import MixtureSource
from actors.objectives.replay_files import StoredGroup, not_finite, write_recipe, write_step
from deepgen.data.loading.collate import MicroBatch

_ANSWER_MARGIN_S = 60.0  # lets the stream's own error, which says more, arrive first
_PAUSE_S = 0.5  # before another rank asks a stream that has started again
_POLICY = "policy"  # prefix of the files that hold earlier policy versions in a checkpoint


@dataclass(frozen=True)
class RLBatch:
    """One rank's share of a step, or a piece of it: samples with their advantages, records for the auxiliary loss.

    In pieces, `held` groups come first, with advantages that lack the batch's factor; `share` is their weight in the
    step. The last piece has `corrections` for groups that came before: what clamping changes (see `_corrections`).
    """

    groups: tuple[Group, ...]  # with the arrays of their trajectories
    records: tuple[MicroBatch, ...]
    share: float = 1.0
    held: bool = False
    corrections: tuple[Correction, ...] = ()


class Correction(NamedTuple):
    """A group whose loss counts again, with `weights` [G]."""

    group: Group
    weights: np.ndarray


class ExperienceSource:
    """Gets batches from the experience stream, and publishes rank 0's weights to it."""

    def __init__(self, context: WorkerContext, stream: Any, auxiliary: MixtureSource | None) -> None:
        self._context, self._auxiliary = context, auxiliary
        experience = context.settings.experience
        self._deadline_s = experience.deadline_s + _ANSWER_MARGIN_S
        self._client = StreamClient(stream, self._deadline_s)
        self._learner, self._introduced = uuid.uuid4().hex, False  # this start of the learner, named by rank 0
        self._publisher = Publisher(self._client, self._learner, experience, self._deadline_s)
        self._overlap = context.settings.overlap()
        self._taken: list[StoredGroup] = []  # the last whole batch of this rank
        self._metrics: dict[str, float] = {}
        self._statistics: dict[str, list[float]] = {}  # rank 0: reward -> scores, missing, sum of scores; of the run
        self._canaries: dict[int, Canary] = {}  # of the versions in the checkpoint that the run resumed from
        self._resumed = 0  # the step that the run goes on with
        self._journals = context.rank == 0 and experience.journal > 0
        # Step of the newest checkpoint under way, which, once complete, makes groups in the journal useless; or None.
        self._journal_waits: int | None = 0 if self._journals else None
        self._forgotten = -1  # groups of steps before this one have been removed

    def next(self, step: int, rank: int, world: int) -> RLBatch | Arriving:
        self._forget_groups()
        if self._overlap.pieces:
            arriving = Arriving(iter(()))
            arriving.pieces = self._pieces(arriving, step, rank, world)
            return arriving
        batch = self._batch(step, rank, world)
        groups = self._fetched(batch.groups)
        self._taken = [StoredGroup(rank + i * world, group) for i, group in enumerate(groups)]
        return RLBatch(groups, self._records(step, rank, world))

    def _pieces(self, arriving: Arriving, step: int, rank: int, world: int) -> Iterator[RLBatch]:
        """This rank's groups, each when it is scored; then the records, and the factor for what was held back."""
        positions = range(rank, self._context.settings.rollout.prompts_per_step, world)
        groups: list[Group] = []
        for position in positions:
            group: Group = self._ask("next_group", step, position)
            groups += self._fetched([group])
            yield RLBatch((groups[-1],), (), share=1 / len(positions), held=self._overlap.held)
        batch = self._batch(step, rank, world)
        arriving.factor = batch.factor
        self._taken = [
            StoredGroup(position, replace(group, advantages=final.advantages), group.advantages)
            for position, group, final in zip(positions, groups, batch.groups, strict=True)
        ]
        records = self._records(step, rank, world)
        if records or batch.clamped:
            yield RLBatch((), records, 1 / len(positions), corrections=_corrections(groups, batch))

    def _batch(self, step: int, rank: int, world: int) -> RankBatch:
        batch: RankBatch = self._ask("next_batch", step, rank, world)
        self._metrics = dict(batch.metrics)
        for name, counts in batch.tally.items():
            before = self._statistics.get(name, [0, 0, 0.0])
            self._statistics[name] = [a + b for a, b in zip(before, counts, strict=True)]
        return batch

    def _fetched(self, groups: Sequence[Group]) -> tuple[Group, ...]:
        """The groups with the arrays of their trajectories. One that was lost with its node is drawn again."""
        try:
            fetched = ray.get([group.trajectory for group in groups], timeout=self._deadline_s)
        except ObjectLostError:
            fetched = [self._fetch_or_draw_again(group) for group in groups]
        return tuple(replace(group, trajectory=arrays) for group, arrays in zip(groups, fetched, strict=True))

    def _fetch_or_draw_again(self, group: Group) -> Arrays:
        """Raises ObjectLostError if it is lost ATTEMPTS times in a row."""
        reference = group.trajectory
        for _ in range(ATTEMPTS - 1):
            with suppress(ObjectLostError):
                found: Arrays = ray.get(reference, timeout=self._deadline_s)
                return found
            self._context.say(f"{group}: its samples were lost with their node; they are drawn again")
            (reference,) = self._ask("draw_again", group.step, group.number)
        last: Arrays = ray.get(reference, timeout=self._deadline_s)
        return last

    def _records(self, step: int, rank: int, world: int) -> tuple[MicroBatch, ...]:
        return tuple(self._auxiliary.next(step, rank, world)) if self._auxiliary else ()

    def publish(self, policy: TrainedModel, version: int) -> None:
        """Score the canary, copy the weights and go on. A thread of rank 0 puts them into the object store and tells
        the stream.

        Its errors come up in the next call. Versions are published in order; at most one copy waits. The first version
        is waited for, on all ranks: from then on the stream knows this learner.
        """
        with torch.no_grad():
            log_prob = float(policy.run(canary_log_prob, self._context.settings.rollout))
        full = policy.weights()
        if self._context.rank == 0:
            # Copies: the next update changes the parameters while the thread still reads.
            copies = {name: tensor.detach().float().to("cpu", copy=True) for name, tensor in full.items()}
            canary = Canary(log_prob, known_kernels(self._context.device))
            self._publisher.start(version, copies, canary)
        if not self._introduced:
            self._publisher.finish()
            self._learner, self._introduced = gather(self._learner, self._context.world)[0], True

    def metrics(self) -> dict[str, float]:
        return self._metrics | ({"object_store/used_share": object_store_share()} if self._context.rank == 0 else {})

    def state_dict(self, step: int) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._context.rank == 0:
            state = self._client.ask("state", step) | {"rewards": self._statistics}
        state["canaries"] = {v: astuple(p.canary) for v, p in self._publisher.earlier(step).items()}  # see `writer`
        if self._auxiliary:
            state["auxiliary"] = self._auxiliary.state_dict(step)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        auxiliary = state.pop("auxiliary", None)
        self._canaries = {int(version): Canary(*saved) for version, saved in state.pop("canaries").items()}
        if self._auxiliary and auxiliary:
            self._auxiliary.load_state_dict(auxiliary)
        self._statistics, self._resumed = state.pop("rewards"), state["step"]
        if self._context.rank == 0:
            self._client.ask("restore", state)

    def writer(self, step: int) -> Callable[[Path], None]:
        """Writes the policy versions before `step` that the next steps are drawn with; none when on-policy.

        It waits for the version under way first, so that an error of the last one comes up with the last checkpoint.
        """
        self._journal_waits = step if self._journals else None
        return partial(self._write, self._publisher.earlier(step), self._publisher.under_way)

    def _write(self, earlier: dict[int, PolicyWeights], under_way: Future[None] | None, folder: Path) -> None:
        if under_way is not None:
            under_way.result(timeout=self._deadline_s)
        for version, published in earlier.items():
            arrays = fetch_weights(published, self._deadline_s)
            pieces = ((name, 0, torch.tensor(array).view(-1)) for name, array in arrays.items())
            write_shard(folder, f"{_POLICY}{version}", 0, pieces)

    def load(self, folder: Path) -> None:
        """Publish these versions again, oldest first: the learner that published them may be gone."""
        if self._context.rank > 0:
            return
        trained = self._context.model.trainable_parameters(self._context.stage)
        for version in saved_policies(folder):
            reader = ShardReader(folder, f"{_POLICY}{version}", 0)
            # Under ZeRO-3 a parameter holds only this rank's part, and ds_shape the whole one's shape.
            shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in trained}
            weights = {name: reader.read(name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}
            self._publisher.publish(version, weights, self._canaries[version], self._resumed)

    def keep(self, folder: Path, step: int) -> str:
        settings, rank = self._context.settings, self._context.rank
        write_step(folder, settings, step, self._taken, self._metrics, (rank, self._context.world))
        found = not_finite([stored.group for stored in self._taken], settings.rewards.used())
        said = [f"not finite: {found}"] if found else []
        if rank == 0:
            said.append(f"to train on its batch alone: {write_recipe(folder, settings)}")
        return "; ".join(said)

    def close(self) -> None:
        self._forget_groups()
        self._publisher.close()
        if self._auxiliary:
            self._auxiliary.close()

    def _forget_groups(self) -> None:
        """Remove the groups that no resume draws any more from the journal: those before the newest checkpoint's step.

        Not when it is written: a death before it is complete goes on from the one before.
        """
        if self._journal_waits is None:
            return
        settings = self._context.settings
        newest = CheckpointStore(settings, self._context.stage).newest()
        if newest is None or newest.step <= self._forgotten:
            return
        self._forgotten = newest.step
        if newest.step >= self._journal_waits:
            self._journal_waits = None
        try:
            forget_groups(settings.run.folder, newest.step)
        except OSError as error:
            self._context.say(f"cannot make room in the journal of {settings.run.folder}: {error}")

    def _ask(self, method: str, *arguments: Any) -> Any:
        """The stream's answer. It may wait for the version under way, so an error of the publisher ends the wait.

        If the stream has started again, rank 0 first publishes what it needs; other ranks wait for that.
        """
        begin = time.monotonic()
        while True:
            try:
                return self._client.ask(method, *arguments, self._learner, meanwhile=self._publisher.check)
            except StreamForgotError:
                if time.monotonic() - begin > self._deadline_s:
                    raise
                if self._context.rank == 0:
                    self._publisher.publish_again()
                else:
                    time.sleep(_PAUSE_S)


def _corrections(held: Sequence[Group], batch: RankBatch) -> tuple[Correction, ...]:
    """What clamping changes in the loss of groups that were held back: as many on every rank, weighted 0 if too many.

    A held sample's loss ends up in proportion to its advantage before clamping, a. With its clamped advantage c it is
    c / a of that, so c / a - 1 of it is added.
    """
    found = []
    for group, final in zip(held, batch.groups, strict=True):
        whitened = group.advantages * np.float32(batch.factor)
        over = np.abs(whitened) > np.abs(final.advantages)
        # Both are 0 for a sample without scores.
        ratio = np.divide(final.advantages, whitened, out=np.ones_like(whitened), where=over)
        found.append(Correction(replace(group, advantages=whitened), ratio - 1))
    found.sort(key=lambda correction: float(correction.weights.min()))  # stable; the strongest first
    return tuple(found[: batch.clamped])


def object_store_share() -> float:
    """Share of the cluster's object store that is in use: objects that somebody still refers to, on all nodes.

    Ray's nodes report it every second or so; one call of a few milliseconds. It sees the objects of other programs on
    the cluster, and not what has been spilled to disk.
    """
    total = ray.cluster_resources().get("object_store_memory", 0.0)
    return 1 - ray.available_resources().get("object_store_memory", 0.0) / total if total else math.nan


def saved_policies(folder: Path) -> list[int]:
    """Versions of the policies in a checkpoint's folder, oldest first."""
    names = (file.name.removeprefix(_POLICY).partition("-")[0] for file in folder.glob(f"{_POLICY}*.safetensors"))
    return sorted(int(name) for name in names)

"""Turns experience into batches for the learner, and sends the learner's weights back to the stream."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

from actors.experience.stream import version_of
from actors.experience.weight_sync import fetch_weights, publish_weights
from actors.learner.checkpoints.checkpoint_shards import ShardReader, write_shard
from actors.learner.protocols import Weights, WorkerContext
from actors.messages import Group, PolicyWeights, RankBatch
from actors.objectives.record_source import MixtureSource
from deepgen.data.loading.collate import MicroBatch

_ANSWER_MARGIN_S = 60.0  # lets the stream's own error, which says more, arrive first
_LOOK_S = 0.2  # between looks at the publisher while a batch is waited for
_POLICY = "policy"  # prefix of the files that hold earlier policy versions in a checkpoint


@dataclass(frozen=True)
class RLBatch:
    """One rank's share of a step: samples with their advantages, and records for the auxiliary loss."""

    groups: tuple[Group, ...]  # with the arrays of their trajectories
    records: tuple[MicroBatch, ...]


class ExperienceSource:
    """Gets batches from the experience stream, and publishes rank 0's weights to it."""

    def __init__(self, context: WorkerContext, stream: Any, auxiliary: MixtureSource | None) -> None:
        self._context, self._stream, self._auxiliary = context, stream, auxiliary
        self._deadline_s = context.settings.experience.deadline_s + _ANSWER_MARGIN_S
        self._metrics: dict[str, float] = {}
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publishing: Future[None] | None = None
        self._published: dict[int, PolicyWeights] = {}  # rank 0: versions that later steps are drawn with, and the last

    def next(self, step: int, rank: int, world: int) -> RLBatch:
        batch: RankBatch = self._ask_while_publishing(self._stream.next_batch.remote(step, rank, world))
        self._metrics = dict(batch.metrics)
        fetched = ray.get([group.trajectory for group in batch.groups], timeout=self._deadline_s)
        groups = [replace(group, trajectory=arrays) for group, arrays in zip(batch.groups, fetched, strict=True)]
        records = self._auxiliary.next(step, rank, world) if self._auxiliary else ()
        return RLBatch(tuple(groups), tuple(records))

    def publish(self, weights: Callable[[], Weights], version: int) -> None:
        """Copy the weights and go on. A thread of rank 0 puts them into the object store and tells the stream.

        Its errors come up in the next call. Versions are published in order; at most one copy waits.
        """
        full = weights()
        if self._context.rank == 0:
            self._finish_publishing()
            # Copies: the next update changes the parameters while the thread still reads.
            copies = {name: tensor.detach().float().to("cpu", copy=True) for name, tensor in full.items()}
            self._publishing = self._publisher.submit(self._publish, version, copies)

    def _publish(self, version: int, weights: Weights) -> None:
        published = publish_weights(version, weights)
        self._ask(self._stream.publish.remote(published))
        self._published[version] = published
        oldest = version_of(version, self._context.settings.experience.max_staleness)
        self._published = {v: p for v, p in self._published.items() if v >= oldest}

    def _finish_publishing(self) -> None:
        """Wait until the last version is published; raise what went wrong with it."""
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.result(timeout=self._deadline_s)

    def metrics(self) -> dict[str, float]:
        return self._metrics

    def state_dict(self, step: int) -> dict[str, Any]:
        state: dict[str, Any] = self._ask(self._stream.state.remote(step)) if self._context.rank == 0 else {}
        if self._auxiliary:
            state["auxiliary"] = self._auxiliary.state_dict(step)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        auxiliary = state.pop("auxiliary", None)
        if self._auxiliary and auxiliary:
            self._auxiliary.load_state_dict(auxiliary)
        if self._context.rank == 0:
            self._ask(self._stream.restore.remote(state))

    def writer(self, step: int) -> Callable[[Path], None]:
        """Writes the policy versions before `step` that the next steps are drawn with; none when on-policy.

        It waits for the version under way first, so that an error of the last one comes up with the last checkpoint.
        """
        oldest = version_of(step, self._context.settings.experience.max_staleness)
        published = dict(self._published)  # a copy: the publisher's thread adds to it
        earlier = {version: weights for version, weights in published.items() if oldest <= version < step}
        return partial(self._write, earlier, self._publishing)

    def _write(self, earlier: dict[int, PolicyWeights], publishing: Future[None] | None, folder: Path) -> None:
        if publishing is not None:
            publishing.result(timeout=self._deadline_s)
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
            self._publish(version, weights)

    def close(self) -> None:
        self._publisher.shutdown()  # finishes what has been submitted: the stage evaluates the last version next
        if self._auxiliary:
            self._auxiliary.close()

    def _ask_while_publishing(self, reference: Any) -> Any:
        """The stream's answer. It may wait for the version under way, so an error of the publisher ends the wait."""
        while self._publishing is not None:
            if self._publishing.done():
                self._finish_publishing()
            elif ray.wait([reference], timeout=_LOOK_S)[0]:
                break
        return self._ask(reference)

    def _ask(self, reference: Any) -> Any:
        return ray.get(reference, timeout=self._deadline_s)


def saved_policies(folder: Path) -> list[int]:
    """Versions of the policies in a checkpoint's folder, oldest first."""
    names = (file.name.removeprefix(_POLICY).partition("-")[0] for file in folder.glob(f"{_POLICY}*.safetensors"))
    return sorted(int(name) for name in names)

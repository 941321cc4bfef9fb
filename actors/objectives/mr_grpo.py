"""MR-GRPO for the learner loop: experience as its batch source, and the loss of one batch.

(1 - lambda) * (policy loss + beta * KL) + lambda * flow matching (paper Eq. 3-5). The gradients of all trained
timesteps, of the KL and of the flow-matching loss add up to one optimizer step (the reference takes 61, M3.7).

Left out: several updates on one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actors.experience.policy_sampler import unpack_group
from actors.experience.stream import GroupBatch, RankBatch
from actors.experience.weight_sync import publish_weights
from actors.learner.loop import Metrics, Parts, StepContext, WorkerContext
from actors.objectives.flow_matching import FlowMatching, FlowMatchingMicro, MixtureSource, open_training_set, size_note
from actors.objectives.policy_losses import PolicyMicro, PolicyTerm
from deepgen.config import Settings
from deepgen.data.loading.collate import MicroBatch
from deepgen.data.loading.mixture import Mixture
from deepgen.data.usable import left_out
from deepgen.evaluation.choose import GRID_PROMPTS, choose_records, heldout_records
from deepgen.evaluation.pictures import grid
from deepgen.evaluation.results import Evaluation
from deepgen.registry import POLICY_LOSSES

if TYPE_CHECKING:
    from deepgen.models.unified import UnifiedModel

_ANSWER_MARGIN_S = 60.0  # the stream's own error, which says more, comes first


@dataclass(frozen=True)
class RLBatch:
    """One rank's share of a step: samples with their advantages, and records for the auxiliary loss."""

    groups: tuple[GroupBatch, ...]
    trajectories: tuple[dict[str, Any], ...]  # packed, one a group
    records: tuple[MicroBatch, ...]


# -- source -----------------------------------------------------------------------------------------------------------


class ExperienceSource:
    """Batches from the experience stream, weights back to it, and pictures of the policy on the way (rank 0)."""

    def __init__(self, context: WorkerContext, stream: Any, auxiliary: MixtureSource | None) -> None:
        self._context, self._stream, self._auxiliary = context, stream, auxiliary
        self._deadline_s = context.settings.experience.deadline_s + _ANSWER_MARGIN_S
        self._metrics: dict[str, float] = {}
        self._observer = Observer(context, stream) if context.tracker is not None else None

    def next(self, step: int, rank: int, world: int) -> RLBatch:
        import ray

        batch: RankBatch = self._ask(self._stream.next_batch.remote(step, rank, world))
        self._metrics = dict(batch.metrics)
        trajectories = ray.get([group.trajectory for group in batch.groups], timeout=self._deadline_s)
        records = self._auxiliary.next(step, rank, world) if self._auxiliary else ()
        return RLBatch(batch.groups, tuple(trajectories), tuple(records))

    def publish(self, weights: Callable[[], dict[str, Tensor]], version: int) -> None:
        full = weights()
        if self._context.rank == 0:
            self._ask(self._stream.publish.remote(publish_weights(version, full)))
        if self._observer:
            self._observer.published(version)

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

    def close(self) -> None:
        if self._observer:
            self._observer.collect(wait_s=0.0)
        if self._auxiliary:
            self._auxiliary.close()

    def _ask(self, reference: Any) -> Any:
        import ray

        return ray.get(reference, timeout=self._deadline_s)


class Observer:
    """Asks for pictures and held-out scores every few versions and logs them once they are there."""

    def __init__(self, context: WorkerContext, stream: Any) -> None:
        settings = context.settings
        self._context, self._stream, self._settings = context, stream, settings
        self._heldout = heldout_records(settings)
        self._quarantined = left_out(settings, "data.prompts", "data.heldout")
        self._grid = choose_records(self._heldout, GRID_PROMPTS, settings.evaluation.seed) if self._heldout else []
        self._pending: list[tuple[int, str, Any]] = []

    def published(self, version: int) -> None:
        """Order what is due at this version. The last one is evaluated by the stage itself, with the first."""
        if self._quarantined and self._context.tracker:
            self._context.tracker.log(version, self._quarantined)
        self._quarantined = {}  # once a start
        if self._heldout and version < self._settings.train.steps:
            if _due(version, self._settings.tracking.grid_every):
                self._order(version, "grid", self._grid, 1)
            if version and _due(version, self._settings.evaluation.every):
                self._order(version, "eval", self._heldout, self._settings.evaluation.samples_per_prompt)
        self.collect(wait_s=0.0 if version < self._settings.train.steps else self._settings.experience.deadline_s)

    def collect(self, wait_s: float) -> None:
        """Log the evaluations that are finished, after waiting for the rest at most `wait_s`."""
        import ray

        if not self._pending:
            return
        references = [reference for _, _, reference in self._pending]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=wait_s)
        for version, what, reference in [item for item in self._pending if item[2] in ready]:
            self._log(version, what, ray.get(reference))
        self._pending = [item for item in self._pending if item[2] not in ready]

    def _order(self, version: int, what: str, records: Sequence[Any], samples: int) -> None:
        self._pending.append((version, what, self._stream.evaluate.remote(records, samples)))

    def _log(self, version: int, what: str, evaluation: Evaluation) -> None:
        tracker = self._context.tracker
        assert tracker is not None
        if what == "grid":
            tracker.log_images("samples", version, grid(evaluation, f"step {version}"))
        else:
            tracker.log(version, {f"eval/{name}": value for name, value in evaluation.means().items()})


def _due(version: int, every: int) -> bool:
    return every > 0 and version % every == 0


def auxiliary_records(context: WorkerContext, objective: FlowMatching) -> MixtureSource:
    """The training records of the auxiliary loss: the same edit:T2I cycle as in the other stages (M2.4)."""
    settings, data = context.settings, open_training_set(context)
    size = max(1, settings.algorithm.sft_batch // (settings.data.edit_per_cycle + settings.data.t2i_per_cycle))
    mixture = Mixture.from_settings(settings, data.store, size)
    context.say(f"{len(data)} records for the auxiliary loss, {size_note(mixture)}")
    return MixtureSource(data, mixture, objective, settings.data.threads)


# -- objective --------------------------------------------------------------------------------------------------------


class MRGRPO:
    """The objective. `reference` is the initial DiT, frozen; None when no KL is asked for, and then it never runs."""

    def __init__(self, settings: Settings, reference: Any, auxiliary: FlowMatching | None) -> None:
        self._sft_coef = settings.algorithm.sft_coef
        self._reference = reference
        self._auxiliary = auxiliary
        self._term: PolicyTerm = POLICY_LOSSES.load(settings.algorithm.policy_loss)(settings)

    @classmethod
    def for_worker(cls, context: WorkerContext, auxiliary: FlowMatching | None) -> MRGRPO:
        algorithm, reference = context.settings.algorithm, None
        if algorithm.kl != "none" and algorithm.kl_beta > 0:
            reference = copy.deepcopy(context.model.transformer).eval().requires_grad_(False)
        return cls(context.settings, reference, auxiliary)

    def prepare(
        self, model: UnifiedModel, batch: RLBatch, context: StepContext
    ) -> list[PolicyMicro | FlowMatchingMicro]:
        micros: list[PolicyMicro | FlowMatchingMicro] = []
        for group, arrays in zip(batch.groups, batch.trajectories, strict=True):
            samples = unpack_group(arrays, context.device)
            micros += self._term.micros(group, samples, context.step, 1 / len(batch.groups))
        if self._auxiliary:
            micros += self._auxiliary.prepare_records(batch.records, context, self._sft_coef)
        return micros

    def evaluation(self, step: int) -> None:
        """The experience stream evaluates the policy, see `Observer`."""

    def loss(
        self, model: UnifiedModel, micro: PolicyMicro | FlowMatchingMicro, context: StepContext
    ) -> tuple[Tensor, Metrics]:
        if isinstance(micro, FlowMatchingMicro):
            assert self._auxiliary is not None
            loss, metrics = self._auxiliary.loss(model, micro, context)
            names = {"loss/flow_matching": "loss/sft", "data/quarantined_sum": "data/quarantined_sum"}
            return loss, {names[key]: value for key, value in metrics.items() if key in names}
        loss, metrics = self._term.loss(model.transformer, self._reference, micro, context)
        return (1 - self._sft_coef) * micro.share * loss, metrics | {"images_sum": micro.images}


# -- both, for the stage ---------------------------------------------------------------------------------------------


def build_rl(context: WorkerContext, stream: Any) -> Parts:
    """Source and objective of rl; `stream` is the handle of the experience stream."""
    settings = context.settings
    if not settings.algorithm.sft_coef:
        return ExperienceSource(context, stream, None), MRGRPO.for_worker(context, None)
    auxiliary = FlowMatching.for_worker(context)
    source = ExperienceSource(context, stream, auxiliary_records(context, auxiliary))
    return source, MRGRPO.for_worker(context, auxiliary)

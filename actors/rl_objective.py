"""MR-GRPO for the learner loop: experience as its batch source, and the loss of one batch.

(1 - lambda) * (clipped policy loss + beta * KL) + lambda * flow matching (paper Eq. 3-5). The gradients of all trained
timesteps, of the KL and of the flow-matching loss add up to one optimizer step (the reference takes 61, M3.7).

Left out: several updates on one batch, GRPO-Guard's ratio normalisation, DiffusionNFT.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.evaluation import GRID_PROMPTS, Evaluation, choose_records, grid, heldout_records
from actors.experience import GroupBatch, RankBatch
from actors.learner import Metrics, Parts, StepContext, WorkerContext
from actors.objectives import FlowMatching, FlowMatchingMicro, MixtureSource, open_training_set, size_note
from actors.prompts import left_out
from actors.sampling import LearnerGroup, unpack_group
from actors.weights import publish_weights
from deepgen.algorithms.losses import PolicyStep, clipped_policy_loss, kl_divergence
from deepgen.config import Settings
from deepgen.data.collate import MicroBatch
from deepgen.data.mixture import Mixture
from deepgen.diffusion.samplers import guided, sampler_step
from deepgen.diffusion.schedule import timesteps

if TYPE_CHECKING:
    from deepgen.models.unified import Conditioning, UnifiedModel

# An unchanged policy must give ratio 1 and KL 0. Measured on a CPU: exactly that in fp32 and in bf16 autocast, whatever
# the micro-batch; 5e-5 off 1 in bf16 under ZeRO-3. The rest is room for other devices' kernels.
RATIO_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
KL_TOLERANCE = {"fp32": 1e-8, "bf16": 1e-3}
_ANSWER_MARGIN_S = 60.0  # the stream's own error, which says more, comes first


class PolicyInvariantError(ArithmeticError):
    """The learner's policy is not the one that drew the samples, although it should be."""


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

    def _ask(self, reference: Any) -> Any:
        import ray

        return ray.get(reference, timeout=self._deadline_s)


class Observer:
    """Asks for pictures and held-out scores every few versions and logs them once they are there."""

    def __init__(self, context: WorkerContext, stream: Any) -> None:
        settings = context.settings
        self._context, self._stream, self._settings = context, stream, settings
        self._heldout = heldout_records(settings, judged=True)  # by the program that started this one
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
    return MixtureSource(data, mixture, objective)


# -- objective --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyMicro:
    """Transitions of one group: B (trained step, sample) pairs, which share prompt and conditioning."""

    x: Tensor  # [B, c, h, w] state before
    next_x: Tensor  # [B, c, h, w] state after
    sigma: Tensor  # [B]
    sigma_next: Tensor  # [B]
    old_log_prob: Tensor  # [B] fp32, under the policy that drew them
    advantage: Tensor  # [B] fp32
    conditioning: Conditioning  # batch B
    unconditional: Conditioning | None
    references: list[Tensor]  # latents of an edit's source images
    version: int  # of the policy that drew them
    share: float  # of the rank's policy loss
    images: float  # images this micro-batch stands for


class MRGRPO:
    """The objective. `reference` is the initial DiT, frozen; None when no KL is asked for, and then it never runs."""

    def __init__(self, settings: Settings, reference: Any, auxiliary: FlowMatching | None) -> None:
        self._rollout, self._algorithm = settings.rollout, settings.algorithm
        self._precision = settings.model.precision
        self._reference = reference
        self._auxiliary = auxiliary
        self._checked_step: int | None = None

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
            micros += self._policy_micros(group, unpack_group(arrays, context.device), 1 / len(batch.groups))
        if self._auxiliary:
            micros += self._auxiliary.prepare_records(batch.records, context, self._algorithm.sft_coef)
        return micros

    def loss(
        self, model: UnifiedModel, micro: PolicyMicro | FlowMatchingMicro, context: StepContext
    ) -> tuple[Tensor, Metrics]:
        if isinstance(micro, FlowMatchingMicro):
            assert self._auxiliary is not None
            loss, metrics = self._auxiliary.loss(model, micro, context)
            names = {"loss/flow_matching": "loss/sft", "data/quarantined_sum": "data/quarantined_sum"}
            return loss, {names[key]: value for key, value in metrics.items() if key in names}
        return self._policy_loss(model, micro, context)

    def _policy_micros(self, group: GroupBatch, samples: LearnerGroup, share: float) -> Iterator[PolicyMicro]:
        """All transitions of a group by timestep, so that a micro-batch of G samples has the rollout's very shapes."""
        steps = [samples.trajectory.step(j) for j in range(len(samples.trajectory))]
        size = len(group.advantages)
        device = steps[0].latents.device
        advantages = torch.tensor(group.advantages, device=device)
        x = torch.cat([step.latents for step in steps])
        next_x = torch.cat([step.next_latents for step in steps])
        sigma = torch.stack([step.sigma for step in steps]).repeat_interleave(size)
        sigma_next = torch.stack([step.sigma_next for step in steps]).repeat_interleave(size)
        log_prob = torch.cat([step.log_prob for step in steps])
        for part in torch.arange(len(x), device=device).split(self._algorithm.update_micro_batch):
            yield PolicyMicro(
                x=x[part],
                next_x=next_x[part],
                sigma=sigma[part],
                sigma_next=sigma_next[part],
                old_log_prob=log_prob[part],
                advantage=advantages[part % size],
                conditioning=samples.conditioning.expand(len(part)),
                unconditional=samples.unconditional.expand(len(part)) if samples.unconditional else None,
                references=samples.references,
                version=group.version,
                share=share * len(part) / len(x),
                images=len(part) / len(steps),
            )

    def _policy_loss(self, model: UnifiedModel, micro: PolicyMicro, context: StepContext) -> tuple[Tensor, Metrics]:
        new = self._score(model.transformer, micro)
        policy = clipped_policy_loss(new.log_prob, micro.old_log_prob, micro.advantage, self._algorithm.clip_range)
        loss = policy.loss
        metrics: dict[str, float | Tensor] = {
            "loss/policy": policy.loss.detach(),
            "policy/ratio_mean": policy.stats["ratio_mean"],
            "policy/ratio_max": policy.stats["ratio_max"],
            "policy/ratio_deviation_max": policy.stats["ratio_deviation"],
            "policy/clip_share": policy.stats["clip_share"],
            "images_sum": micro.images,
        }
        if self._reference is not None:
            with torch.no_grad():
                old = self._score(self._reference, micro)
            kl = kl_divergence(self._algorithm.kl, new.step, old.step).mean()
            loss = loss + self._algorithm.kl_beta * kl
            metrics |= {"policy/kl": kl.detach(), "loss/kl": self._algorithm.kl_beta * kl.detach()}
        self._check(micro, metrics, context)
        return (1 - self._algorithm.sft_coef) * micro.share * loss, metrics

    def _score(self, transformer: Any, micro: PolicyMicro) -> _Scored:
        """What a DiT says about the transitions."""
        references = [micro.references] * len(micro.x) if micro.references else None

        def velocity(conditioning: Conditioning) -> Tensor:
            c = conditioning
            return transformer(micro.x, timesteps(micro.sigma), c.context, c.pooled, references, c.mask).float()

        v = velocity(micro.conditioning)
        if micro.unconditional is not None:
            v = guided(v, velocity(micro.unconditional), self._rollout.guidance_scale)
        result = sampler_step(
            self._rollout.sampler,
            micro.x,
            v,
            micro.sigma,
            micro.sigma_next,
            eta=self._rollout.eta,
            next_x=micro.next_x,
        )
        return _Scored(PolicyStep(v, result.mean, result.std), result.log_prob)

    def _check(self, micro: PolicyMicro, metrics: Metrics, context: StepContext) -> None:
        """In this process's first update: an on-policy ratio is 1, and the initial model has no KL to itself."""
        if self._checked_step not in (None, context.step) or micro.version != context.step:
            return
        self._checked_step = context.step
        deviation, allowed = float(metrics["policy/ratio_deviation_max"]), RATIO_TOLERANCE[self._precision]
        if not deviation <= allowed:
            raise PolicyInvariantError(
                f"step {context.step}, on-policy: the probability ratio is off 1 by {deviation:.2e}, "
                f"more than {allowed:.0e}; rollout and learner do not run the same policy"
            )
        if context.step == 0 and "policy/kl" in metrics:
            kl, allowed = float(metrics["policy/kl"]), KL_TOLERANCE[self._precision]
            if not kl <= allowed:
                raise PolicyInvariantError(
                    f"step 0: the KL of the initial policy to itself is {kl:.2e}, more than {allowed:.0e}"
                )


@dataclass(frozen=True)
class _Scored:
    step: PolicyStep
    log_prob: Tensor  # [B] fp32


# -- both, for the stage ---------------------------------------------------------------------------------------------


def build_rl(context: WorkerContext, stream: Any) -> Parts:
    """Source and objective of rl; `stream` is the handle of the experience stream."""
    settings = context.settings
    if not settings.algorithm.sft_coef:
        return ExperienceSource(context, stream, None), MRGRPO.for_worker(context, None)
    auxiliary = FlowMatching.for_worker(context)
    source = ExperienceSource(context, stream, auxiliary_records(context, auxiliary))
    return source, MRGRPO.for_worker(context, auxiliary)

"""MR-GRPO: the learner's loss on one batch of experience.

(1 - lambda) * (policy loss + beta * KL) + lambda * flow matching (paper Eq. 3-5). The gradients of all trained
timesteps, of the KL and of the flow-matching loss add up to one optimizer step (the reference takes 61, M3.7).

Left out: several updates on one batch.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actors.experience.policy_sampler import unpack_samples
from actors.learner.protocols import Metrics, StepContext, WorkerContext
from actors.objectives.experience_source import RLBatch
from actors.objectives.flow_matching import FlowMatching, FlowMatchingMicro
from actors.objectives.policy_losses import PolicyMicro, PolicyTerm
from deepgen.config import Settings
from deepgen.registry import POLICY_LOSSES

if TYPE_CHECKING:
    from deepgen.models.unified import UnifiedModel


class MRGRPO:
    """The MR-GRPO objective. `reference` is the frozen initial DiT, or None if the settings ask for no KL."""

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
        for group in batch.groups:
            samples = unpack_samples(group.trajectory, context.device)
            micros += self._term.micros(group, samples, context.step, 1 / len(batch.groups))
        if self._auxiliary:
            micros += self._auxiliary.prepare_records(batch.records, context, self._sft_coef)
        return micros

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

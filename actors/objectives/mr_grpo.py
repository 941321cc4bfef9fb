"""MR-GRPO: the learner's loss on one batch of experience.

(1 - lambda) * (policy loss + beta * KL) + lambda * flow matching (paper Eq. 3-5). The gradients of all trained
timesteps, of the KL and of the flow-matching loss add up to one optimizer step (the reference takes 61, M3.7), or to
`algorithm.updates_per_batch` steps: groups and records of a batch are then split in order into as many mini-batches,
and the loss of each is the mean over its own. What the losses need of the policy that the first step starts from is
computed in `prepare`.

A batch may come in pieces, group by group (`experience_source`). The policy loss of a piece is then held back until
the whitening factor of the batch is known; KL and flow matching are not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actors.experience.policy.policy_sampler import unpack_samples
from actors.learner.protocols import Held, HeldLoss, Metrics, StepContext, WorkerContext
from actors.messages import Group
from actors.objectives.experience_source import RLBatch
from actors.objectives.flow_matching import FlowMatching, FlowMatchingMicro
from actors.objectives.policy_losses import Part, PolicyMicro, PolicyTerm
from deepgen.config import Settings
from deepgen.registry import POLICY_LOSSES

if TYPE_CHECKING:
    from deepgen.models.unified import UnifiedModel


class MRGRPO:
    """The MR-GRPO objective. `reference` is the frozen initial DiT, or None if the settings ask for no KL."""

    def __init__(self, settings: Settings, reference: Any, auxiliary: FlowMatching | None) -> None:
        self._sft_coef, self._updates = settings.algorithm.sft_coef, settings.algorithm.updates_per_batch
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
        for update, part in enumerate(split_batch(batch, self._updates)):
            for group in part.groups:
                share = batch.share / len(part.groups)
                drawn = self._micros(group, context, share, "held" if batch.held else "whole", update)
                micros += [self._term.at_start(model.transformer, micro, context) for micro in drawn]
            if self._auxiliary and part.records:
                records = self._auxiliary.prepare_records(part.records, context, self._sft_coef)
                micros += [replace(micro, update=update) for micro in records]
        for group, weights in batch.corrections:
            micros += _weighted(self._micros(group, context, batch.share, "correction"), weights)
        return micros

    def _micros(
        self, group: Group, context: StepContext, share: float, part: Part, update: int = 0
    ) -> Iterator[PolicyMicro]:
        samples = unpack_samples(group.trajectory, context.device)
        for micro in self._term.micros(group, samples, context.step, share, update):
            yield replace(micro, part=part)

    def mini_batches(
        self, micros: Sequence[PolicyMicro | FlowMatchingMicro]
    ) -> list[Sequence[PolicyMicro | FlowMatchingMicro]]:
        return [list(part) for _, part in groupby(micros, key=lambda micro: micro.update)]

    def loss(
        self, model: UnifiedModel, micro: PolicyMicro | FlowMatchingMicro, context: StepContext
    ) -> tuple[Tensor | HeldLoss, Metrics]:
        if isinstance(micro, FlowMatchingMicro):
            assert self._auxiliary is not None
            loss, metrics = self._auxiliary.loss(model, micro, context)
            names = {"loss/flow_matching": "loss/sft"}
            names |= {key: key for key in ("data/quarantined_sum", "data/cut_prompts_sum")}
            return loss, {names[key]: value for key, value in metrics.items() if key in names}
        if micro.part == "correction":  # its KL and its metrics have counted already
            terms = self._term.loss(model.transformer, None, micro, context)
            return (1 - self._sft_coef) * micro.share * terms.policy, {}
        terms = self._term.loss(model.transformer, self._reference, micro, context)
        scale, metrics = (1 - self._sft_coef) * micro.share, terms.metrics | {"images_sum": micro.images}
        if micro.part == "held":
            held = Held(scale * terms.policy, {"loss/policy": metrics.pop("loss/policy")})
            return HeldLoss(None if terms.kl is None else scale * terms.kl, held), metrics
        return scale * terms.total, metrics


def _weighted(micros: Iterable[PolicyMicro], weights: np.ndarray) -> Iterator[PolicyMicro]:
    """The micro-batches of one group with a weight for each of its samples, [G]; see `PolicyMicro.split`."""
    first = 0
    for micro in micros:
        own = np.arange(first, first + len(micro.x)) % len(weights)
        yield replace(micro, weight=torch.tensor(weights[own], device=micro.x.device))
        first += len(micro.x)


def split_batch(batch: RLBatch, count: int) -> Iterator[RLBatch]:
    """``count`` batches of neighbouring groups, equally many, and of records, as even as can be, of every micro-batch.

    Each so has the batch's cycle of editing and generation. Raises ValueError if ``count`` does not divide the groups.
    """
    size, rest = divmod(len(batch.groups), count)
    if rest:
        raise ValueError(f"{len(batch.groups)} groups can't be split into {count} equal mini-batches")
    records = [micro.split(count) for micro in batch.records]
    for part in range(count):
        groups = batch.groups[part * size : (part + 1) * size]
        yield RLBatch(groups, tuple(parts[part] for parts in records))

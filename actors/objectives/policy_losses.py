"""Policy losses on a group of samples: one class for each `algorithm.policy_loss`, and the KL term.

`ClippedRatio` scores the sampled transitions (paper Eq. 3); `NegativeAware` trains the forward process on the finished
samples (DiffusionNFT). To add a loss, write a class with `micros`, `at_start` and `loss` and name it in
`deepgen.registry.POLICY_LOSSES`.

Three policies occur: the one that drew the samples (behaviour), the one that the step started from (proximal), and the
one being trained. On-policy, in the first update of a batch at staleness 0, all three are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from actors.experience.policy.policy_sampler import Samples, trained_steps
from actors.learner.protocols import Metrics, StepContext
from actors.messages import Group
from deepgen.algorithms.losses import (
    PolicyLoss,
    PolicyStep,
    clipped_policy_loss,
    interpolate,
    kl_divergence,
    kl_velocity,
    negative_aware_loss,
    truncated_importance,
)
from deepgen.config import Settings
from deepgen.diffusion.samplers import guided, sampler_step
from deepgen.diffusion.schedule import timesteps
from deepgen.diffusion.trajectory import Step, draw_noise
from deepgen.errors import UserError
from deepgen.seeds import stable_seed

if TYPE_CHECKING:
    from deepgen.models.unified import Conditioning

# An unchanged policy must give ratio 1 and KL 0. Measured on a CPU: both are exact in fp32 and in bf16 autocast,
# whatever the micro-batch; the ratio is off by 5e-5 in bf16 under ZeRO-3. The rest is room for the kernels of other
# devices.
RATIO_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
KL_TOLERANCE = {"fp32": 1e-8, "bf16": 1e-3}


# A micro-batch of a whole batch; of a piece, whose policy loss is held back; of a group that came before, again.
Part = Literal["whole", "held", "correction"]


class PolicyInvariantError(ArithmeticError):
    """The learner's policy is not the one that drew the samples, although it should be."""


@dataclass(frozen=True, kw_only=True)
class PolicyMicro:
    """B (noise level, sample) pairs of one group, which share prompt and conditioning."""

    x: Tensor  # [B, c, h, w] latents at noise level sigma
    sigma: Tensor  # [B]
    advantage: Tensor  # [B] fp32
    conditioning: Conditioning  # batch B
    unconditional: Conditioning | None
    references: list[Tensor]  # latents of an edit's source images
    version: int | None  # version of the policy that drew the samples
    update: int  # optimizer steps on the same batch before it
    share: float  # weight in the rank's policy loss
    images: float  # its share of the group's images, for images per second
    weight: Tensor | None = None  # [B] further weights of the samples in the policy loss
    part: Part = "whole"

    @classmethod
    def split(
        cls, group: Group, samples: Samples, share: float, update: int, largest: int, **pairs: Tensor
    ) -> Iterator[Self]:
        """Split a group into micro-batches of at most `largest` pairs.

        pairs: the fields with one row per pair, ordered by noise level. A micro-batch of G pairs then has exactly the
        shapes of the rollout.
        """
        advantages = torch.tensor(group.advantages, device=pairs["x"].device)
        count = len(pairs["x"])
        pairs["advantage"] = advantages.repeat(count // len(advantages))
        for parts in zip(*(tensor.split(largest) for tensor in pairs.values()), strict=True):
            batch = len(parts[0])
            yield cls(
                **dict(zip(pairs, parts, strict=True)),
                conditioning=samples.conditioning.expand(batch),
                unconditional=samples.unconditional.expand(batch) if samples.unconditional else None,
                references=samples.references,
                version=group.version,
                update=update,
                share=share * batch / count,
                images=batch / count * len(advantages),
            )

    def on_policy(self, step: int) -> bool:
        """Whether the policy that is trained in `step` drew the samples."""
        return self.version == step and self.update == 0

    def velocity(self, transformer: Any, guidance_scale: float = 1.0) -> Tensor:
        """Velocity that a DiT predicts for x, fp32 [B, c, h, w]."""
        references = [self.references] * len(self.x) if self.references else None

        def branch(c: Conditioning) -> Tensor:
            v: Tensor = transformer(self.x, timesteps(self.sigma), c.context, c.pooled, references, c.mask)
            return v.float()

        v = branch(self.conditioning)
        if guidance_scale == 1 or self.unconditional is None:
            return v
        return guided(v, branch(self.unconditional), guidance_scale)


class PolicyTerm(Protocol):
    def __init__(self, settings: Settings) -> None: ...

    def micros(self, group: Group, samples: Samples, step: int, share: float, update: int) -> Iterator[PolicyMicro]:
        """Micro-batches of a group. Together their losses have weight `share` in the policy loss of one update.

        update: optimizer steps on the same batch before it. Groups of one update must give equally many micro-batches.
        """

    def at_start(self, transformer: Any, micro: Any, context: StepContext) -> Any:
        """`micro`, with what the loss needs of the policy that the step starts from.

        Called for every micro-batch before the first update of a batch, without gradients.
        """

    def loss(self, transformer: Any, reference: Any, micro: Any, context: StepContext) -> PolicyTerms:
        """Policy loss and beta * KL to `reference` (None: no KL), and the metrics to log."""


class PolicyTerms(NamedTuple):
    policy: Tensor  # []
    kl: Tensor | None  # [], with beta
    metrics: dict[str, float | Tensor]

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.policy if self.kl is None else self.policy + self.kl


# -- sampler steps and their probabilities (paper Eq. 3) ------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TransitionMicro(PolicyMicro):
    next_x: Tensor  # [B, c, h, w] state after x
    sigma_next: Tensor  # [B]
    old_log_prob: Tensor  # [B] fp32, under the policy that drew the samples
    proximal_log_prob: Tensor | None = None  # [B] fp32, under the policy that the step started from, where needed
    truncated: float | None = None  # share of the group's transitions that are left out; None: nothing to leave out


class ClippedRatio:
    """Probability ratios of the sampled transitions, clipped.

    They are ratios to the policy that drew the samples, or with `algorithm.decoupled_loss` to the policy that the step
    started from, weighted by truncated importance. Transitions of off-policy samples to a level below
    `algorithm.off_policy_min_sigma` are left out of policy loss and KL, and not computed: towards the clean end the
    step's variance goes to 0, and ratios to another policy say nothing (OP-GRPO, arXiv 2604.04142).
    """

    def __init__(self, settings: Settings) -> None:
        self._rollout, self._algorithm = settings.rollout, settings.algorithm
        self._precision = settings.model.precision
        self._checked_step: int | None = None

    def micros(self, group: Group, samples: Samples, step: int, share: float, update: int) -> Iterator[TransitionMicro]:
        steps, truncated = [samples.trajectory.step(j) for j in range(len(samples.trajectory))], None
        if self._algorithm.off_policy_min_sigma and (group.version != step or update):
            steps, truncated = self._well_conditioned(steps, group)
        size = len(samples.trajectory.final)
        micros = TransitionMicro.split(
            group,
            samples,
            share,
            update,
            self._algorithm.update_micro_batch,
            x=torch.cat([step.latents for step in steps]),
            next_x=torch.cat([step.next_latents for step in steps]),
            sigma=torch.stack([step.sigma for step in steps]).repeat_interleave(size),
            sigma_next=torch.stack([step.sigma_next for step in steps]).repeat_interleave(size),
            old_log_prob=torch.cat([step.log_prob for step in steps]),
        )
        return (replace(micro, truncated=truncated) for micro in micros)

    def _well_conditioned(self, steps: list[Step], group: Group) -> tuple[list[Step], float]:
        """The steps that off-policy samples are trained on, and the share of those left out: the same on all ranks."""
        lowest = self._algorithm.off_policy_min_sigma
        kept = [step for step in steps if float(step.sigma_next) >= lowest]
        if not kept:
            raise UserError(
                f"algorithm.off_policy_min_sigma: got {lowest:g}, which leaves out all trained steps of {group}; "
                f"allowed here: at most {max(float(step.sigma_next) for step in steps):g}"
            )
        return kept, 1 - len(kept) / len(steps)

    def at_start(self, transformer: Any, micro: TransitionMicro, context: StepContext) -> TransitionMicro:
        # In the first update the policy still is the proximal one, so `loss` has its log-probabilities anyway.
        if not self._decoupled(micro, context) or micro.update == 0:
            return micro
        return replace(micro, proximal_log_prob=self._score(transformer, micro)[1])

    def _decoupled(self, micro: TransitionMicro, context: StepContext) -> bool:
        """Whether behaviour and proximal policy differ, and the loss has to tell them apart."""
        return self._algorithm.decoupled_loss and micro.version != context.step

    def loss(self, transformer: Any, reference: Any, micro: TransitionMicro, context: StepContext) -> PolicyTerms:
        new, log_prob = self._score(transformer, micro)
        policy, more = self._policy_loss(log_prob, micro, context)
        metrics: dict[str, float | Tensor] = {
            "policy/ratio_mean": policy.stats["ratio_mean"],
            "policy/ratio_max": policy.stats["ratio_max"],
            "policy/ratio_deviation_max": policy.stats["ratio_deviation"],
            "policy/clip_share": policy.stats["clip_share"],
            **more,
        }
        kl = None
        if reference is not None:
            with torch.no_grad():
                old, _ = self._score(reference, micro)
            kl = kl_divergence(self._algorithm.kl, new, old)
        terms = _terms(policy.loss, kl, self._algorithm.kl_beta, metrics)
        self._check(micro, terms.metrics, context)
        return terms

    def _policy_loss(
        self, log_prob: Tensor, micro: TransitionMicro, context: StepContext
    ) -> tuple[PolicyLoss, dict[str, Tensor | float]]:
        """The policy loss, and metrics of what is done about off-policy samples. log_prob [B]."""
        truncated = {} if micro.truncated is None else {"policy/truncated_share": micro.truncated}
        clip_range = self._algorithm.clip_range
        if not self._decoupled(micro, context):
            loss = clipped_policy_loss(log_prob, micro.old_log_prob, micro.advantage, clip_range, micro.weight)
            return loss, {**truncated}
        proximal = log_prob.detach() if micro.proximal_log_prob is None else micro.proximal_log_prob
        weights, stats = truncated_importance(proximal, micro.old_log_prob, self._algorithm.importance_cap)
        loss = clipped_policy_loss(log_prob, proximal, micro.advantage, clip_range, weights)
        return loss, {f"policy/{name}": value for name, value in stats.items()} | truncated

    def _score(self, transformer: Any, micro: TransitionMicro) -> tuple[PolicyStep, Tensor]:
        """A DiT's prediction for the transitions, and their log-probabilities [B]."""
        v = micro.velocity(transformer, self._rollout.guidance_scale)
        result = sampler_step(
            self._rollout.sampler,
            micro.x,
            v,
            micro.sigma,
            micro.sigma_next,
            eta=self._rollout.eta,
            next_x=micro.next_x,
        )
        return PolicyStep(v, result.mean, result.std, result.kl_std), result.log_prob

    def _check(self, micro: TransitionMicro, metrics: Metrics, context: StepContext) -> None:
        """Check this process's first update: the on-policy ratio is 1, the KL of the initial model to itself is 0."""
        if self._checked_step not in (None, context.step) or not micro.on_policy(context.step):
            return
        self._checked_step = context.step
        deviation, allowed = float(metrics["policy/ratio_deviation_max"]), RATIO_TOLERANCE[self._precision]
        if deviation > allowed:  # not if it is NaN: the loss is NaN then, too, and the loop saves its batch
            raise PolicyInvariantError(
                f"step {context.step}, on-policy: the probability ratio is off 1 by {deviation:.2e}, "
                f"more than {allowed:.0e}; rollout and learner do not run the same policy"
            )
        _check_kl(metrics, micro, context, self._precision)


# -- the forward process of finished samples (DiffusionNFT) ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampleMicro(PolicyMicro):
    x0: Tensor  # [B, c, h, w] finished samples
    v_old: Tensor | None = None  # [B, c, h, w] fp32, of the policy that the step started from; None: the current one


class NegativeAware:
    """The old policy of `negative_aware_loss` is the one that the step started from.

    In the first update of a batch that is the current policy, detached. For later updates `at_start` computes its
    velocities; from then on the loss holds back the policy, as the clip does in `ClippedRatio`. Staleness changes which
    samples there are, not this: the learner has no weights of the policy that drew stale ones, and needs none, because
    the first gradient is that of A err / 2 whatever drew them.

    Guided rollouts (guidance_scale above 1) train the unguided velocity.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._algorithm = settings, settings.algorithm

    def micros(self, group: Group, samples: Samples, step: int, share: float, update: int) -> Iterator[SampleMicro]:
        """Finished samples, noised to the levels of this step's trained steps.

        All samples of a group get the same noise, so that what they have in common cancels out with their advantages.
        """
        final, levels = samples.trajectory.final, trained_steps(self._settings, step)
        seed = stable_seed("forward", self._settings.run.seed, step, group.record.id)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.cat([draw_noise([generator], final.shape[1:]).expand_as(final) for _ in levels])
        x0 = final.repeat(len(levels), 1, 1, 1)
        sigma = samples.trajectory.sigmas[levels].repeat_interleave(len(final))
        return SampleMicro.split(
            group,
            samples,
            share,
            update,
            self._algorithm.update_micro_batch,
            x=interpolate(x0, noise.to(x0.device), sigma),
            x0=x0,
            sigma=sigma,
        )

    def at_start(self, transformer: Any, micro: SampleMicro, context: StepContext) -> SampleMicro:
        return replace(micro, v_old=micro.velocity(transformer)) if micro.update else micro

    def loss(self, transformer: Any, reference: Any, micro: SampleMicro, context: StepContext) -> PolicyTerms:
        v = micro.velocity(transformer)
        policy = negative_aware_loss(
            v,
            v.detach() if micro.v_old is None else micro.v_old,
            micro.x,
            micro.x0,
            micro.sigma,
            micro.advantage,
            beta=1.0,  # no effect on the gradient while v == v_old, in the first update: see the function
            clip=self._algorithm.advantage_clip,
        )
        kl = None
        if reference is not None:
            with torch.no_grad():
                old = micro.velocity(reference)
            kl = kl_velocity(v, old)
        metrics = {"policy/positive_share": policy.stats["positive_share"]}
        terms = _terms(policy.loss, kl, self._algorithm.kl_beta, metrics)
        _check_kl(terms.metrics, micro, context, self._settings.model.precision)
        return terms


# -- shared by both losses ------------------------------------------------------------------------------------------


def _terms(policy: Tensor, kl: Tensor | None, beta: float, metrics: Metrics) -> PolicyTerms:
    """policy and beta * mean(kl) for kl [B] (None: no KL), with both as metrics beside the given ones."""
    logged = {**metrics, "loss/policy": policy.detach()}
    if kl is None:
        return PolicyTerms(policy, None, logged)
    mean = kl.mean()
    return PolicyTerms(policy, beta * mean, logged | {"policy/kl": mean.detach(), "loss/kl": beta * mean.detach()})


def _check_kl(metrics: Metrics, micro: PolicyMicro, context: StepContext, precision: str) -> None:
    """Raise PolicyInvariantError unless the KL is 0 before the first update, where the policy is the initial one."""
    if context.step == 0 and micro.update == 0 and "policy/kl" in metrics:
        kl, allowed = float(metrics["policy/kl"]), KL_TOLERANCE[precision]
        if kl > allowed:  # NaN: as in `ClippedRatio._check`
            raise PolicyInvariantError(
                f"step 0: the KL of the initial policy to itself is {kl:.2e}, more than {allowed:.0e}"
            )

"""What a group of samples teaches the policy: one class for each `algorithm.policy_loss`, and the KL beside it.

`ClippedRatio` scores the sampler steps that were drawn (paper Eq. 3); `NegativeAware` trains the forward process on the
finished samples (DiffusionNFT). A new one is a class with `micros` and `loss`, and its entry in `POLICY_TERMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from actors.experience import GroupBatch
from actors.learner import Metrics, StepContext
from actors.sampling import LearnerGroup, trained_steps
from deepgen.algorithms.losses import (
    PolicyStep,
    clipped_policy_loss,
    interpolate,
    kl_divergence,
    kl_velocity,
    negative_aware_loss,
)
from deepgen.config import Settings
from deepgen.diffusion.rollout import draw_noise, stable_seed
from deepgen.diffusion.samplers import guided, sampler_step
from deepgen.diffusion.schedule import timesteps

if TYPE_CHECKING:
    from deepgen.models.unified import Conditioning

# An unchanged policy must give ratio 1 and KL 0. Measured on a CPU: exactly that in fp32 and in bf16 autocast, whatever
# the micro-batch; 5e-5 off 1 in bf16 under ZeRO-3. The rest is room for other devices' kernels.
RATIO_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
KL_TOLERANCE = {"fp32": 1e-8, "bf16": 1e-3}


class PolicyInvariantError(ArithmeticError):
    """The learner's policy is not the one that drew the samples, although it should be."""


@dataclass(frozen=True)
class PolicyMicro:
    """B (noise level, sample) pairs of one group, which share prompt and conditioning."""

    x: Tensor  # [B, c, h, w] latents at noise level sigma
    sigma: Tensor  # [B]
    advantage: Tensor  # [B] fp32
    conditioning: Conditioning  # batch B
    unconditional: Conditioning | None
    references: list[Tensor]  # latents of an edit's source images
    version: int  # of the policy that drew the samples
    share: float  # of the rank's policy loss
    images: float  # images this micro-batch stands for

    def velocity(self, transformer: Any, guidance_scale: float = 1.0) -> Tensor:
        """What a DiT says about x, fp32 [B, c, h, w]."""
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

    def micros(self, group: GroupBatch, samples: LearnerGroup, step: int, share: float) -> Iterator[PolicyMicro]:
        """Micro-batches of a group, whose losses together count `share` in the rank's policy loss."""

    def loss(
        self, transformer: Any, reference: Any, micro: Any, context: StepContext
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Policy loss + beta * KL to `reference` (None: no KL), a scalar, and what to log."""


# -- sampler steps and their probabilities (paper Eq. 3) ------------------------------------------------------------


@dataclass(frozen=True)
class TransitionMicro(PolicyMicro):
    next_x: Tensor  # [B, c, h, w] state after x
    sigma_next: Tensor  # [B]
    old_log_prob: Tensor  # [B] fp32, under the policy that drew them


class ClippedRatio:
    def __init__(self, settings: Settings) -> None:
        self._rollout, self._algorithm = settings.rollout, settings.algorithm
        self._precision = settings.model.precision
        self._checked_step: int | None = None

    def micros(self, group: GroupBatch, samples: LearnerGroup, step: int, share: float) -> Iterator[TransitionMicro]:
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
            yield TransitionMicro(
                x=x[part],
                sigma=sigma[part],
                advantage=advantages[part % size],
                next_x=next_x[part],
                sigma_next=sigma_next[part],
                old_log_prob=log_prob[part],
                share=share * len(part) / len(x),
                images=len(part) / len(steps),
                **_of_group(group, samples, len(part)),
            )

    def loss(
        self, transformer: Any, reference: Any, micro: TransitionMicro, context: StepContext
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        new, log_prob = self._score(transformer, micro)
        policy = clipped_policy_loss(log_prob, micro.old_log_prob, micro.advantage, self._algorithm.clip_range)
        loss = policy.loss
        metrics: dict[str, float | Tensor] = {
            "loss/policy": policy.loss.detach(),
            "policy/ratio_mean": policy.stats["ratio_mean"],
            "policy/ratio_max": policy.stats["ratio_max"],
            "policy/ratio_deviation_max": policy.stats["ratio_deviation"],
            "policy/clip_share": policy.stats["clip_share"],
        }
        if reference is not None:
            with torch.no_grad():
                old, _ = self._score(reference, micro)
            kl = kl_divergence(self._algorithm.kl, new, old).mean()
            loss = loss + self._algorithm.kl_beta * kl
            metrics |= {"policy/kl": kl.detach(), "loss/kl": self._algorithm.kl_beta * kl.detach()}
        self._check(micro, metrics, context)
        return loss, metrics

    def _score(self, transformer: Any, micro: TransitionMicro) -> tuple[PolicyStep, Tensor]:
        """What a DiT says about the transitions, and their log-probabilities [B]."""
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
        return PolicyStep(v, result.mean, result.std), result.log_prob

    def _check(self, micro: TransitionMicro, metrics: Metrics, context: StepContext) -> None:
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
        _check_kl(metrics, context, self._precision)


# -- the forward process of finished samples (DiffusionNFT) ---------------------------------------------------------


@dataclass(frozen=True)
class SampleMicro(PolicyMicro):
    x0: Tensor  # [B, c, h, w] finished samples
    noise: Tensor  # [B, c, h, w]


class NegativeAware:
    """The old policy of `negative_aware_loss` is the trained one before its update: one update is made of a batch.
    Guided rollouts (guidance_scale above 1) teach the unguided velocity."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._algorithm = settings, settings.algorithm

    def micros(self, group: GroupBatch, samples: LearnerGroup, step: int, share: float) -> Iterator[SampleMicro]:
        """The samples at the noise levels of this step's trained steps. All samples of a group get the same noise, so
        that what they have in common cancels out with their advantages."""
        x0 = samples.trajectory.final
        device, size = x0.device, len(x0)
        advantages = torch.tensor(group.advantages, device=device)
        levels = trained_steps(self._settings, step)
        sigma = samples.trajectory.sigmas[levels].repeat_interleave(size)
        seed = stable_seed("forward", self._settings.run.seed, step, group.prompt_id)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.cat([draw_noise([generator], x0.shape[1:]).expand_as(x0) for _ in levels]).to(device)
        for part in torch.arange(len(sigma), device=device).split(self._algorithm.update_micro_batch):
            finished = x0[part % size]
            yield SampleMicro(
                x=interpolate(finished, noise[part], sigma[part]),
                sigma=sigma[part],
                advantage=advantages[part % size],
                x0=finished,
                noise=noise[part],
                share=share * len(part) / len(sigma),
                images=len(part) / len(levels),
                **_of_group(group, samples, len(part)),
            )

    def loss(
        self, transformer: Any, reference: Any, micro: SampleMicro, context: StepContext
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        v = micro.velocity(transformer)
        policy = negative_aware_loss(
            v,
            v.detach(),
            micro.x0,
            micro.noise,
            micro.sigma,
            micro.advantage,
            beta=1.0,  # of no account in the first update, see the function
            clip=self._algorithm.advantage_clip,
        )
        loss = policy.loss
        metrics: dict[str, float | Tensor] = {
            "loss/policy": policy.loss.detach(),
            "policy/positive_share": policy.stats["positive_share"],
        }
        if reference is not None:
            with torch.no_grad():
                old = micro.velocity(reference)
            kl = kl_velocity(v, old).mean()
            loss = loss + self._algorithm.kl_beta * kl
            metrics |= {"policy/kl": kl.detach(), "loss/kl": self._algorithm.kl_beta * kl.detach()}
            _check_kl(metrics, context, self._settings.model.precision)
        return loss, metrics


# -- both -------------------------------------------------------------------------------------------------------------


def _of_group(group: GroupBatch, samples: LearnerGroup, batch: int) -> dict[str, Any]:
    """The fields of `PolicyMicro` that all samples of a group share."""
    return {
        "conditioning": samples.conditioning.expand(batch),
        "unconditional": samples.unconditional.expand(batch) if samples.unconditional else None,
        "references": samples.references,
        "version": group.version,
    }


def _check_kl(metrics: Metrics, context: StepContext, precision: str) -> None:
    """Before the first update the policy is the initial one, and its distance to that is 0."""
    if context.step == 0 and "policy/kl" in metrics:
        kl, allowed = float(metrics["policy/kl"]), KL_TOLERANCE[precision]
        if not kl <= allowed:
            raise PolicyInvariantError(
                f"step 0: the KL of the initial policy to itself is {kl:.2e}, more than {allowed:.0e}"
            )


POLICY_TERMS: dict[str, Callable[[Settings], PolicyTerm]] = {
    "clipped_ratio": ClippedRatio,
    "diffusion_nft": NegativeAware,
}

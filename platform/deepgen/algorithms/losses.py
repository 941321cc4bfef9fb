"""Losses: flow matching (stages 1 and 2) and MR-GRPO (stage 3), as pure functions over tensors.

One RL batch minimises (1 - lambda) * (policy + beta * KL) + lambda * SFT (paper Eq. 3-5, M3.6). All three terms train
the velocity: the policy term moves it as the advantages say, the KL term holds it near the starting model, and the SFT
term (plain flow matching on real images) keeps it a good generator.

Left out: clamping of log-probabilities and GRPO-Guard's ratio normalisation (off in the published recipe).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepgen.registry import KL_FORMS

_VARIANCE_EPS = 1e-7  # added to 2 std^2 in the reference's KL terms
_SMALLEST_ERROR = 1e-5  # smallest divisor of an error, so that tiny errors are not blown up


# -- flow matching (M2.1) --------------------------------------------------------------------------


class FlowMatchingLoss(NamedTuple):
    loss: Tensor  # []
    per_sample: Tensor  # [B]


def interpolate(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise. x0, noise [B, c, h, w] with sigma [B], or one sample [c, h, w] with one number.

    Computed in fp32 and cast back to x0's dtype: a sigma rounded to bf16 would not match the timestep the model gets.
    """
    level = torch.as_tensor(sigma, dtype=torch.float32, device=x0.device)
    level = level.reshape(level.shape + (1,) * (x0.dim() - level.dim()))
    return ((1 - level) * x0.float() + level * noise.float()).to(x0.dtype)


def flow_matching_loss(
    v_pred: Tensor | Sequence[Tensor], x0: Tensor | Sequence[Tensor], noise: Tensor | Sequence[Tensor]
) -> FlowMatchingLoss:
    """Squared error against the velocity noise - x0: mean over a sample's elements, then over samples, in fp32.

    Each argument is a batch [B, c, h, w] or a list of B samples [c, h, w] of different sizes; a large image counts as
    much as a small one.
    """
    errors = [((v.float() - (n.float() - x.float())) ** 2).mean() for v, x, n in zip(v_pred, x0, noise, strict=True)]
    per_sample = torch.stack(errors)
    return FlowMatchingLoss(per_sample.mean(), per_sample)


# -- policy (paper Eq. 3) --------------------------------------------------------------------------


class PolicyLoss(NamedTuple):
    loss: Tensor  # []
    stats: dict[str, Tensor]  # scalars without gradient, described at each loss


def clipped_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float, weights: Tensor | None = None
) -> PolicyLoss:
    """mean(w max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range))) with rho = exp(log_prob - old_log_prob).

    All tensors [B]. Log-probabilities must be fp32, because bf16 rounds them more coarsely than clip_range (M3.6).
    weights: w, which no gradient reaches; None is 1 for every sample. The mean is over samples, not over weights.
    stats: ratio_mean, ratio_max, ratio_deviation (largest |rho - 1|, exactly 0 in the first on-policy update) and
    clip_share, the share of samples whose gradient is cut off by the clip.
    """
    if not log_prob.dtype == old_log_prob.dtype == torch.float32:
        raise ValueError(f"log-probabilities must be float32, got {log_prob.dtype} and {old_log_prob.dtype}")
    if not log_prob.shape == old_log_prob.shape == advantages.shape:
        shapes = f"{list(log_prob.shape)}, {list(old_log_prob.shape)}, {list(advantages.shape)}"
        raise ValueError(f"log_prob, old_log_prob and advantages must have one shape, got {shapes}")
    if weights is not None and weights.shape != log_prob.shape:
        raise ValueError(f"weights must have the shape of log_prob, {list(log_prob.shape)}, got {list(weights.shape)}")
    ratio = torch.exp(log_prob - old_log_prob.detach())
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    with torch.no_grad():
        stats = {
            "ratio_mean": ratio.mean(),
            "ratio_max": ratio.max(),
            "ratio_deviation": (ratio - 1).abs().max(),
            "clip_share": (clipped > plain).float().mean(),
        }
    losses = torch.maximum(plain, clipped)
    return PolicyLoss((losses if weights is None else weights.detach() * losses).mean(), stats)


class Importance(NamedTuple):
    weights: Tensor  # [B], min(importance, cap)
    stats: dict[str, Tensor]  # scalars: importance_mean, importance_max (both before the cap), importance_capped_share


def truncated_importance(proximal_log_prob: Tensor, behaviour_log_prob: Tensor, cap: float) -> Importance:
    """min(exp(log pi_prox - log pi_behaviour), cap): weights of decoupled PPO (Hilton et al. 2021, arXiv 2110.00641).

    Both log-probabilities [B] fp32: of the policy that the step started from, against which ratio and clip are taken,
    and of the policy that drew the samples. The weight w corrects for what lies between the two; the cap bounds its
    variance and biases it (truncated importance sampling). No gradient.

    The samplers' log-probabilities are means over the D dimensions of a latent, so w is not the quotient of densities
    q = pi_prox / pi_behaviour. It is q^(1/D) for flow_sde and dance_sde; for cps, whose log-probability is the squared
    distance without variance, it is q^(2 std^2 / D). So w is a tempered weight, as near to 1 as the ratios are, and
    only a policy that has moved very far reaches a cap of 2.
    """
    with torch.no_grad():
        importance = torch.exp(proximal_log_prob - behaviour_log_prob)
        stats = {
            "importance_mean": importance.mean(),
            "importance_max": importance.max(),
            "importance_capped_share": (importance > cap).float().mean(),
        }
        return Importance(importance.clamp(max=cap), stats)


# -- policy, by the forward process (DiffusionNFT; M3.6) -------------------------------------------


def negative_aware_loss(
    v: Tensor, v_old: Tensor, x: Tensor, x0: Tensor, sigma: Tensor, advantages: Tensor, *, beta: float, clip: float
) -> PolicyLoss:
    """DiffusionNFT: flow matching towards samples with a high advantage and away from those with a low one.

    v, v_old, x, x0 [B, c, h, w]; sigma, advantages [B]. v and v_old are velocities at x = (1 - sigma) x0 + sigma noise:
    v of the trained policy, v_old of the policy that the step started from. With r = (clamp(A / clip, -1, 1) + 1) / 2
    the loss is clip / beta * mean(r err((1 - beta) v_old + beta v) + (1 - r) err((1 + beta) v_old - beta v)). err is
    the squared error of the image that a velocity implies, divided by its mean size (without gradient), so that every
    noise level counts equally. No log-probability is needed: samples may come from any sampler. While v equals v_old,
    the gradient is that of A times err / 2 in v; beta decides how far v may go before the loss holds it back.

    The reference uses the trajectory's next latent as x0 (M3.6), for which the derivation does not hold; here x0 is the
    final latent. stats: positive_share, the mean of r.
    """
    x, x0, v, v_old = x.float(), x0.float(), v.float(), v_old.detach().float()
    level = sigma.float().reshape(-1, 1, 1, 1)

    def error(velocity: Tensor) -> Tensor:  # [B]
        difference = x - level * velocity - x0
        size = difference.detach().abs().flatten(1).mean(dim=1).clamp_min(_SMALLEST_ERROR)
        return (difference**2).flatten(1).mean(dim=1) / size

    positive = (advantages / clip).clamp(-1, 1) / 2 + 0.5
    losses = positive * error((1 - beta) * v_old + beta * v) + (1 - positive) * error((1 + beta) * v_old - beta * v)
    with torch.no_grad():
        stats = {"positive_share": positive.mean()}
    return PolicyLoss(losses.mean() * clip / beta, stats)


# -- distance from the reference model: all [B, c, h, w] -> [B], exactly 0 for equal inputs --------


def kl_velocity(v: Tensor, v_ref: Tensor) -> Tensor:
    """(v - v_ref)^2, averaged over elements: the paper's Eq. 4."""
    return ((v.float() - v_ref.float()) ** 2).flatten(1).mean(dim=1)


def kl_velocity_scaled(v: Tensor, v_ref: Tensor, std: Tensor) -> Tensor:
    """(v - v_ref)^2 / (2 std^2): the form of the reference code; std [B, 1, 1, 1] is the `kl_std` of a sampler step.

    That is the step's deviation for cps and dance_sde. For flow_sde it is the diffusion coefficient eta sqrt(sigma /
    (1 - sigma)), as the reference takes it: the variance of a step, smaller by the factor sigma - sigma', would make
    the weight of this KL depend on the number of sampler steps.

    For CPS with eta 1, std is sigma'. The result exceeds `kl_velocity` by the factor 1 / (2 std^2), which grows without
    bound towards the clean end. A beta chosen for one form is wrong for the other, so the forms have two names.
    """
    return _over_variance(v, v_ref, std)


def kl_latent_mean(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """(mean - mean_ref)^2 / (2 std^2): KL between the two Gaussian sampler steps, averaged over elements.

    std [B, 1, 1, 1] is the deviation of the step, whatever the sampler. The reference's form for means is equal for cps
    and dance_sde. For flow_sde it divides by the squared diffusion coefficient (see `kl_velocity_scaled`), so it is
    this KL times sigma - sigma'.
    """
    return _over_variance(mean, mean_ref, std)


def _over_variance(a: Tensor, b: Tensor, std: Tensor) -> Tensor:
    return ((a.float() - b.float()) ** 2 / (2 * std.float() ** 2 + _VARIANCE_EPS)).flatten(1).mean(dim=1)


class PolicyStep(NamedTuple):
    """One model's prediction for one sampler step; each KL form uses the part it needs."""

    velocity: Tensor  # [B, c, h, w]
    mean: Tensor  # [B, c, h, w]
    std: Tensor  # [B, 1, 1, 1], of the step
    kl_std: Tensor  # [B, 1, 1, 1], `StepResult.kl_std`


def velocity(new: PolicyStep, reference: PolicyStep) -> Tensor:
    """`algorithm.kl: velocity` (paper Eq. 4), [B]."""
    return kl_velocity(new.velocity, reference.velocity)


def velocity_scaled(new: PolicyStep, reference: PolicyStep) -> Tensor:
    """`algorithm.kl: velocity_scaled` (the reference's form), [B]."""
    return kl_velocity_scaled(new.velocity, reference.velocity, new.kl_std)


def latent_mean(new: PolicyStep, reference: PolicyStep) -> Tensor:
    """`algorithm.kl: latent_mean`, between the means of the step, [B]."""
    return kl_latent_mean(new.mean, reference.mean, new.std)


def kl_divergence(name: str, new: PolicyStep, reference: PolicyStep) -> Tensor:
    """KL in the form called `name` (a key of KL_FORMS), [B].

    "none" is not a form: without a KL no reference model runs, so there is nothing to compare.
    """
    divergence: Callable[[PolicyStep, PolicyStep], Tensor] = KL_FORMS.load(name)
    return divergence(new, reference)


def combine(policy: Tensor, kl: Tensor | float, beta: float, sft: Tensor | float, sft_coef: float) -> Tensor:
    """(1 - lambda) * (policy + beta * kl) + lambda * sft with lambda = sft_coef; policy, kl, sft are scalars (Eq. 5).

    The terms usually live in different micro-batches. The loss is linear, so each term can be passed alone, with zeros
    for the others, and backpropagated by itself.
    """
    return (1 - sft_coef) * (policy + beta * kl) + sft_coef * sft

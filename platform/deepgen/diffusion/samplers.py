"""One sampling step x -> x' from noise level sigma to sigma' < sigma, and its log-probability (M3.3).

A sampler is a pair of pure functions, with a name in `deepgen.registry.SAMPLERS`:

* `transition(x, v, sigma, sigma', eta) -> mean, std`: the step is x' = mean + std * noise;
* `log_prob(x', mean, std) -> [B]`: what policy-gradient training compares between the new and the old policy.

The rollout draws x' (`noise=`); training scores the x' that was drawn (`next_x=`). Both go through `sampler_step`, so
an unchanged policy gives bit-equal log-probabilities and a ratio of exactly 1.

Everything is computed and returned in fp32, whatever the input: in bf16, neighbouring log-probabilities near -1 are
forty times the clip range of the published recipe apart (M3.6).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepgen.algorithms.rules import ETA_MAX
from deepgen.errors import UserError
from deepgen.registry import SAMPLERS

_EPS = 1e-8  # added to std^2 and to std in the Gaussian density, as in the reference; matters for std near 1e-3

Transition = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]


class StepResult(NamedTuple):
    """One step for B samples, all fp32: x' = mean + std * noise."""

    next: Tensor  # [B, c, h, w]
    mean: Tensor  # [B, c, h, w]
    std: Tensor  # [B, 1, 1, 1]
    kl_std: Tensor  # [B, 1, 1, 1], what the reference's scaled KL has in place of std; see `Sampler`
    log_prob: Tensor  # [B], mean over all but the batch dimension; zeros for a deterministic step


@dataclass(frozen=True)
class Sampler:
    """A sampler.

    kl_per_time: the reference's scaled KL divides by the squared diffusion coefficient, std^2 / (sigma - sigma'), and
    not by the step's variance std^2 (M3.6).
    """

    transition: Transition
    log_prob: LogProb
    eta_max: float = math.inf  # largest eta that makes sense
    stochastic: bool = True
    kl_per_time: bool = False


def sampler_step(
    name: str,
    x: Tensor,
    v: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    eta: float,
    noise: Tensor | None = None,
    next_x: Tensor | None = None,
) -> StepResult:
    """Draw a step (`noise` given) or score one that was drawn before (`next_x` given).

    x, v, noise, next_x: [B, c, h, w], any float dtype. sigma, sigma_next: one number, or one per sample [B]. Gradients
    reach `mean` and `log_prob` through v; x' counts as data in `log_prob`.

    `ode` draws without noise and has log-probability 0: a deterministic step adds nothing to a trajectory's
    log-probability. Scoring such a step is refused, so nobody can train on those zeros by mistake.

    Raises UserError for an unknown sampler or an eta out of range, ValueError unless exactly one of noise and next_x is
    given (for `ode`: if next_x is given).
    """
    sampler = SAMPLERS.load(name)
    if sampler.stochastic and not 0 < eta <= sampler.eta_max:
        limit = f" and at most {sampler.eta_max:g}" if sampler.eta_max < math.inf else ""
        raise UserError(f"rollout.eta: got {eta} with sampler {name!r}; allowed: above 0{limit} (for 0 use 'ode')")
    if sampler.stochastic and (noise is None) == (next_x is None):
        raise ValueError(f"sampler {name!r} needs either noise (to draw) or next_x (to score)")
    if not sampler.stochastic and next_x is not None:
        raise ValueError(f"sampler {name!r} is deterministic: a step of it has no density to score")

    x, v = x.float(), v.float()
    level, next_level = _per_sample(sigma, x), _per_sample(sigma_next, x)
    mean, std = sampler.transition(x, v, level, next_level, eta)
    kl_std = std / torch.sqrt(level - next_level) if sampler.kl_per_time else std
    if next_x is not None:
        next_x = next_x.float()
    elif noise is not None and sampler.stochastic:
        next_x = mean + std * noise.float()
    else:
        next_x = mean
    return StepResult(next_x, mean, std, kl_std, sampler.log_prob(next_x.detach(), mean, std))


def guided(velocity_cond: Tensor, velocity_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, v_u + scale * (v_c - v_u) (M1.8), same shape. A scale of 1 gives exactly v_c."""
    if scale == 1:
        return velocity_cond
    return velocity_uncond + scale * (velocity_cond - velocity_uncond)


def _per_sample(sigma: float | Tensor, x: Tensor) -> Tensor:
    """sigma as fp32 [B, 1, 1, 1]."""
    column = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
    return column.reshape(-1, *[1] * (x.dim() - 1))


# -- transitions: x, v [B, c, h, w]; sigma, sigma_next [B, 1, 1, 1] --------------------------------


def cps_transition(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Coefficients-preserving sampling (paper Eq. 6): image and noise keep exactly the shares that sigma' demands.

    A share sin(eta pi/2) of the noise in x' is fresh. At eta 1 all of it is: each step estimates the image and adds
    noise from scratch.
    """
    image = x - sigma * v
    old_noise = x + (1 - sigma) * v
    fresh = math.sin(eta * math.pi / 2)
    kept = math.sqrt(1 - fresh**2)
    return (1 - sigma_next) * image + sigma_next * kept * old_noise, sigma_next * fresh


def flow_sde_transition(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Flow-GRPO's SDE: Euler-Maruyama with diffusion eta * sqrt(sigma / (1 - sigma))."""
    dt = sigma_next - sigma
    # At sigma 1 the diffusion is infinite. For that first step the reference uses the next level in the denominator.
    variance = eta**2 * sigma / (1 - torch.where(sigma >= 1, sigma_next, sigma))
    mean = x * (1 + variance / (2 * sigma) * dt) + v * (1 + variance * (1 - sigma) / (2 * sigma)) * dt
    return mean, torch.sqrt(-dt * variance)


def dance_sde_transition(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """DanceGRPO's SDE: constant diffusion eta, with the score as drift correction."""
    dt = sigma_next - sigma
    image = x - sigma * v
    correction = 0.5 * eta**2 * (x - image * (1 - sigma)) / sigma**2
    return x + (v + correction) * dt, eta * torch.sqrt(-dt)


def ode_transition(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Euler step of the probability-flow ODE, without noise: the limit of every other sampler as eta goes to 0."""
    return x + v * (sigma_next - sigma), torch.zeros_like(sigma)


# -- log-probabilities: next_x, mean [B, c, h, w]; std [B, 1, 1, 1] -> [B] -------------------------


def _mean_per_sample(values: Tensor) -> Tensor:
    # Sum in fp64: the fp32 result then does not depend on how a batch was split over calls or threads.
    return values.double().flatten(1).mean(dim=1).float()


def squared_distance_log_prob(next_x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """-(x' - mean)^2 (paper Eq. 7). Without variance and normaliser, every step pulls in proportion to its own noise.

    The paper sums over dimensions. The reference takes the mean; so do we, because clip_range relies on it.
    """
    return _mean_per_sample(-((next_x - mean) ** 2))


def gaussian_log_prob(next_x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x'; mean, std^2), averaged over dimensions."""
    distance = (next_x - mean) ** 2 / (2 * (std**2 + _EPS))
    return _mean_per_sample(-distance - torch.log(std + _EPS) - 0.5 * math.log(2 * math.pi))


def certain_log_prob(next_x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log 1 = 0: a deterministic step has probability 1."""
    return mean.new_zeros(mean.shape[0])


# -- the samplers by name: `deepgen.registry.SAMPLERS` ---------------------------------------------

CPS = Sampler(cps_transition, squared_distance_log_prob, eta_max=ETA_MAX["cps"])
FLOW_SDE = Sampler(flow_sde_transition, gaussian_log_prob, kl_per_time=True)
DANCE_SDE = Sampler(dance_sde_transition, gaussian_log_prob)
ODE = Sampler(ode_transition, certain_log_prob, stochastic=False)

"""Noise levels of rectified flow: from sigma 1, pure noise, to sigma 0, the image; x = (1 - sigma) x0 + sigma noise.

Two grids share one static shift, s(u) = shift * u / (1 + (shift - 1) * u), which spends more steps at high noise. The
transformer gets 1000 * sigma as its time. Left out: resolution-dependent ("dynamic") shifting, unused by DeepGen.
"""

import torch
from torch import Tensor

from deepgen.errors import UserError

TRAIN_STEPS = 1000


def _shifted(u: Tensor, shift: float) -> Tensor:
    return shift * u / (1 + (shift - 1) * u)


def training_sigmas(shift: float = 3.0) -> Tensor:
    """Noise levels that training draws from, fp32 [1000], from 1 down to shift/(999 + shift) (M2.1)."""
    u = torch.arange(TRAIN_STEPS, 0, -1, dtype=torch.float64) / TRAIN_STEPS
    return _shifted(u, shift).float()


def draw_training_sigmas(count: int, shift: float = 3.0, generator: torch.Generator | None = None) -> Tensor:
    """`count` independent entries of `training_sigmas`, uniform over the grid: fp32 [count] on the CPU (M2.1)."""
    return training_sigmas(shift)[torch.randint(TRAIN_STEPS, (count,), generator=generator)]


def rollout_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """Noise levels visited by sampling, fp32 [num_steps + 1], from 1 to 0 (M3.3; equals diffusers' flow-match Euler).

    The even grid ends at the smallest *training* sigma, which is already shifted. The whole grid is then shifted, so
    its low end is shifted twice. The published recipe has this quirk, so we keep it.
    """
    if num_steps < 1:
        raise UserError(f"rollout.num_steps: got {num_steps}; allowed: 1 or more")
    u = torch.linspace(1.0, float(training_sigmas(shift)[-1]), num_steps, dtype=torch.float64)
    return torch.cat([_shifted(u, shift), u.new_zeros(1)]).float()


def timesteps(sigmas: Tensor) -> Tensor:
    """Noise levels in the transformer's units: 1000 * sigma, same shape."""
    return sigmas * TRAIN_STEPS

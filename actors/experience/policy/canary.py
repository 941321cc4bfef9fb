"""The canary: one fixed sampler step, scored by the learner and by every rollout actor that loads its weights.

A checksum says which bytes the parameters hold. It does not say that a forward reads these parameters: a module that
was replaced, or a copy that something cached, would draw samples with other weights. The log-probability of a
transition says it, because it is computed as that of a sample is.

It is taken in fp32, also where the run uses bf16 autocast. On the tiny model with one tensor at a time off by one
optimizer step (4e-5), a canary under autocast does not see 43 of the 209 tensors that a sample depends on, because
rounding hides them; in fp32 it sees all. And ZeRO-3's own linear, which rounds bf16 differently, gives the same bits
for two tokens in fp32. Threads make no difference, at the widths of deepgen-5b either.
"""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from actors.experience.policy.weight_sync import WeightsMismatchError
from actors.messages import Canary
from deepgen.diffusion.schedule import timesteps
from deepgen.registry import SAMPLERS

if TYPE_CHECKING:
    from deepgen.config.settings import RolloutSettings
    from deepgen.models.unified import UnifiedModel

# Fewer would hide weights: attention over one token is constant in its queries and keys (attn2 of the DiT).
IMAGE_TOKENS = CONTEXT_TOKENS = 2
SIGMA, SIGMA_NEXT = 0.75, 0.5
# Largest difference where learner and actor round differently, relative to a log-probability above 1. Instruction sets
# of one CPU (AVX-512, AVX2, none; MKL's and torch's) differ by at most 1.1e-7; the rest is room for accelerators and
# deep models, as much as the ratio of an unchanged policy has in fp32 (`RATIO_TOLERANCE`).
TOLERANCE = 1e-5
_PRODUCTS = {"linear", "conv2d", "addmm", "matmul"}  # the last two are what ZeRO-3's linear calls
_BLOCK = 64  # bytes
_CPU = Path("/proc/cpuinfo")


def take_canary(model: UnifiedModel, rollout: RolloutSettings) -> Canary:
    """The canary of a whole model. For one that ZeRO-3 has split, see `canary_log_prob`."""
    return Canary(float(canary_log_prob(model, rollout)), known_kernels(model.transformer.device))


@torch.no_grad()
def canary_log_prob(model: UnifiedModel, rollout: RolloutSettings) -> Tensor:
    """Log-probability of the transition under the model's DiT, a mean over its elements: fp64 [].

    It depends on the DiT's weights, its sizes, and the run's sampler (cps in place of one without probabilities).
    Neither torch's global generator nor the training mode is touched; the DiT has no dropout. The learner calls this
    inside its engine's forward, on all ranks, because ZeRO-3 gathers the weights there.
    """
    transformer, generator = model.transformer, torch.Generator().manual_seed(0)
    config, device = transformer.config, transformer.device

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    latents = 1, config.in_channels, config.patch_size, IMAGE_TOKENS * config.patch_size
    x, next_x = draw(*latents), draw(*latents)
    context, pooled = draw(1, CONTEXT_TOKENS, config.joint_attention_dim), draw(1, config.pooled_projection_dim)
    sigma, sigma_next = torch.tensor([[SIGMA], [SIGMA_NEXT]], device=device)
    with torch.autocast(device.type, enabled=False), _Aligned():
        v = transformer(x, timesteps(sigma), context, pooled)
        sampler, eta = SAMPLERS.load(rollout.sampler), rollout.eta
        if not sampler.stochastic:
            sampler, eta = SAMPLERS.load("cps"), 1.0
        mean, std = sampler.transition(x, v, sigma.view(1, 1, 1, 1), sigma_next.view(1, 1, 1, 1), eta)
        # Each element counts as a sample of its own, and their mean is taken in fp64: the fp32 mean of one sample would
        # hide a change that is small in each element.
        elements = sampler.log_prob(*(tensor.reshape(-1, 1, 1, 1) for tensor in (next_x, mean, std.expand_as(mean))))
    return elements.double().mean()


class _Aligned(TorchFunctionMode):
    """Moves operands of matrix products to where memory blocks begin, as the allocator places a model's parameters.

    ZeRO-1 and 2 keep parameters in one flat buffer, wherever the one before ended, and MKL rounds differently there.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in _PRODUCTS:
            args = [arg.clone() if isinstance(arg, Tensor) and arg.data_ptr() % _BLOCK else arg for arg in args]
        return function(*args, **(kwargs or {}))


def known_kernels(device: torch.device) -> str | None:
    """Name of what rounds a process's sums. Two processes of one name give equal bits; None is never equal.

    DeepSpeed replaces `linear` under ZeRO-3. An accelerator chooses kernels by rules of its own.
    """
    if device.type != "cpu":
        return None
    about = _CPU.read_text(encoding="utf-8").splitlines() if _CPU.exists() else []
    names = (line.partition(":")[2] for line in about if line.startswith("model name"))
    model = next(names, platform.machine())
    return f"{model.strip()}, {torch.backends.cpu.get_cpu_capability()}, {torch.nn.functional.linear.__name__}"


def check_canary(here: Canary, learner: Canary, version: int) -> None:
    """Raise WeightsMismatchError unless both have the same log-probability; NaN never passes.

    Equal kernels must give equal bits, others may be off by `TOLERANCE`.
    """
    exact = here.kernels is not None and here.kernels == learner.kernels
    allowed = 0.0 if exact else TOLERANCE * max(1.0, abs(learner.log_prob))
    if not (math.isfinite(learner.log_prob) and abs(here.log_prob - learner.log_prob) <= allowed):
        raise WeightsMismatchError(
            f"weights of version {version}: the learner's canary has log-probability {learner.log_prob!r}, the rollout "
            f"policy's {here.log_prob!r}; allowed: {f'{allowed:.0e} apart' if allowed else 'the same bits'}"
        )

"""Rollout: takes a group of samples from noise to latents, and keeps the steps that training needs.

Randomness is per sample. Each sample has its own generator, seeded from (run seed, prompt, epoch, index), which
supplies all its noise in a fixed order: first the starting noise, then one draw at each stochastic step. A sample's
noise therefore does not depend on the batch it is in, on the actor or on a restart. (The model's velocity may: matrix
kernels can round differently at another batch size, so a group repeats bit for bit only in the same batches.)
Generators live on the CPU, so noise is also the same on every device type.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepgen.diffusion.samplers import guided, sampler_step
from deepgen.diffusion.schedule import timesteps
from deepgen.errors import UserError
from deepgen.registry import SAMPLERS, SDE_WINDOWS
from deepgen.seeds import sample_seed, stable_seed

_GROUP = -1  # "sample index" of the generator whose noise a whole group shares


class VelocityFn(Protocol):
    """latents [B, c, h, w], timesteps [B] in 0..1000 -> velocity [B, c, h, w]."""

    def __call__(self, latents: Tensor, timesteps: Tensor, /) -> Tensor: ...


# -- seeds and noise -------------------------------------------------------------------------------


def step_seed(run_seed: int, step: int) -> int:
    """Seed of what all ranks and groups of a training step share: the choice of trained sampler steps."""
    return stable_seed("step", run_seed, step)


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal fp32 [G, *shape] on the generators' device; row g comes from generator g alone."""
    return torch.stack([torch.randn(*shape, generator=g, device=g.device) for g in generators])


def start_group(
    shape: Sequence[int],
    *,
    run_seed: int,
    prompt_id: str,
    epoch: int,
    indices: Sequence[int],
    same_noise: bool = False,
) -> tuple[Tensor, list[torch.Generator]]:
    """Starting noise [len(indices), *shape] (CPU, fp32) and the samples' generators, ready for `sample`.

    same_noise: all samples of the group start from one draw and diverge at the first stochastic step. The noise of the
    steps is the same with and without it.
    """

    def generator(index: int) -> torch.Generator:
        return torch.Generator().manual_seed(sample_seed(run_seed, prompt_id, epoch, index))

    generators = [generator(index) for index in indices]
    noise = draw_noise(generators, shape)
    if same_noise:
        noise = draw_noise([generator(_GROUP)], shape).repeat(len(generators), *[1] * len(shape))
    return noise, generators


# -- which steps are trained -----------------------------------------------------------------------


def random_subset(num_steps: int, count: int, rng: random.Random) -> list[int]:
    # num_steps - 1 leaves out the last step: it ends at sigma 0, where cps adds no noise that could be scored.
    return sorted(rng.sample(range(num_steps - 1), count))


def random_window(num_steps: int, count: int, rng: random.Random) -> list[int]:
    # The latest start is num_steps - count - 1, so the window ends before the last step.
    start = rng.randrange(num_steps - count)
    return list(range(start, start + count))


def first_window(num_steps: int, count: int, rng: random.Random) -> list[int]:
    return list(range(count))


def choose_sde_steps(num_steps: int, sde_steps: int, window: str, seed: int) -> list[int]:
    """Indices of the `sde_steps` sampler steps to train, sorted, never the last one (M3.4).

    window "all": every step of the trajectory is stochastic and a random subset is trained (the published recipe).
    window "window": only a random run of neighbouring steps is stochastic, and all of them are trained. The ODE leads
    to the window and away from it, so samples are cleaner and fewer states have to be kept.
    window "first": like "window", but at the beginning, where most of the picture is decided. With few steps, later
    ones add next to no noise: of three steps, the second ends at sigma 0.009.

    `seed` comes from `step_seed(run seed, step)`: the choice is the same for all ranks and groups of a training step.
    """
    choose = SDE_WINDOWS.load(window)
    if not 0 <= sde_steps < num_steps:
        raise UserError(f"rollout.sde_steps: got {sde_steps} with {num_steps} steps; allowed: 0 to {num_steps - 1}")
    return choose(num_steps, sde_steps, random.Random(seed))


# -- the trajectory --------------------------------------------------------------------------------


class Step(NamedTuple):
    """One trained step of a group, in the form that `sampler_step(..., next_x=)` takes."""

    step_index: int  # 0..num_steps-1
    latents: Tensor  # [G, c, h, w]
    next_latents: Tensor  # [G, c, h, w]
    sigma: Tensor  # [], time for the model is 1000 * sigma
    sigma_next: Tensor  # []
    log_prob: Tensor  # [G], under the policy that drew the step


@dataclass
class Trajectory:
    """What training needs from one group: S trained steps of G samples, all fp32.

    Each state is stored once: neighbouring steps share the state between them. M is S + 1 for a window and at most 2 S
    for a scattered choice.
    A group takes about (M + 1) * G * c * h * w * 4 bytes: 0.7 MB for the tiny preset ([8, 16, 16], G 8, a window of 9),
    90 MiB for 30 of 50 steps at 512 px ([16, 64, 64], G 8, M about 42).
    """

    latents: Tensor  # [M, G, c, h, w] states, in the order they were visited
    position: Tensor  # [S] int: step j leads from latents[position[j]] to latents[position[j] + 1]
    step_index: Tensor  # [S] int: which sampler step j is, ascending
    sigmas: Tensor  # [num_steps + 1]
    log_probs: Tensor  # [S, G]
    final: Tensor  # [G, c, h, w] latents to decode

    def __len__(self) -> int:
        return len(self.step_index)

    def step(self, j: int) -> Step:
        """Trained step j of 0..S-1."""
        index, position = int(self.step_index[j]), int(self.position[j])
        return Step(
            index,
            self.latents[position],
            self.latents[position + 1],
            self.sigmas[index],
            self.sigmas[index + 1],
            self.log_probs[j],
        )

    def to(self, device: torch.device | str) -> "Trajectory":
        """Copy on another device. Dtypes stay: rounded states or log-probabilities would move the ratio off 1."""
        return Trajectory(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())


# -- the loop --------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    velocity_fn: VelocityFn,
    noise: Tensor,
    sigmas: Tensor,
    *,
    sampler: str,
    eta: float,
    sde_steps: Sequence[int],
    generators: Sequence[torch.Generator],
    window: str = "all",
    same_noise: bool = False,
    guidance_scale: float = 1.0,
    velocity_uncond_fn: VelocityFn | None = None,
) -> Trajectory:
    """Sample G latents from `noise` [G, c, h, w] down the levels `sigmas` [num_steps + 1] (M3.3).

    sde_steps: indices to keep for training, from `choose_sde_steps`; empty for evaluation.
    generators: one per sample, as `start_group` returned them.
    window: "all" draws noise at every step, "window" and "first" only at sde_steps (ODE at the others).
    same_noise: the rows of `noise` are equal and share one condition, so one row stands for all until noise is drawn;
    until then `velocity_fn` gets [1, c, h, w].
    guidance_scale: a value other than 1 costs a second forward, of `velocity_uncond_fn`. Training on the trajectory
    must then guide its velocities too.
    """
    num_steps = len(sigmas) - 1
    trained = set(sde_steps)
    _check_request(len(noise), num_steps, sampler, trained, generators, window, guidance_scale, velocity_uncond_fn)

    x = noise[:1].float() if same_noise else noise.float()
    sigmas = sigmas.to(x.device, torch.float32)
    states: dict[int, Tensor] = {}
    log_probs: list[Tensor] = []
    for i in range(num_steps):
        name = sampler if window == "all" or i in trained else "ode"
        if SAMPLERS.load(name).stochastic and len(x) < len(noise):
            x = x.expand(len(noise), *x.shape[1:])
        t = timesteps(sigmas[i]).expand(len(x))
        v = velocity_fn(x, t)
        if guidance_scale != 1 and velocity_uncond_fn is not None:
            v = guided(v, velocity_uncond_fn(x, t), guidance_scale)
        fresh = draw_noise(generators, x.shape[1:]).to(x.device) if SAMPLERS.load(name).stochastic else None
        step = sampler_step(name, x, v, sigmas[i], sigmas[i + 1], eta=eta, noise=fresh)
        if i in trained:
            # After a trained step i - 1, states[i] holds this tensor already: neighbours share the state between them.
            states[i], states[i + 1] = x, step.next
            log_probs.append(step.log_prob)
        x = step.next
    return _trajectory(states, sorted(trained), sigmas, log_probs, x.expand(len(noise), *x.shape[1:]))


def _check_request(
    samples: int,
    num_steps: int,
    sampler: str,
    trained: set[int],
    generators: Sequence[torch.Generator],
    window: str,
    guidance_scale: float,
    velocity_uncond_fn: VelocityFn | None,
) -> None:
    SDE_WINDOWS.path(window)
    if trained and not SAMPLERS.load(sampler).stochastic:
        allowed = ", ".join(name for name, entry in SAMPLERS.items() if entry.stochastic)
        raise UserError(f"rollout.sampler: got {sampler!r}, whose steps can't be trained on; allowed: {allowed}")
    if not trained <= set(range(num_steps)):
        raise ValueError(f"sde_steps {sorted(trained)} are not all among the {num_steps} steps")
    if len(generators) != samples:
        raise ValueError(f"{samples} samples need as many generators, got {len(generators)}")
    if guidance_scale != 1 and velocity_uncond_fn is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs velocity_uncond_fn")


def _trajectory(
    states: dict[int, Tensor], trained: list[int], sigmas: Tensor, log_probs: list[Tensor], final: Tensor
) -> Trajectory:
    # States i and i + 1 of a trained step are neighbours in `kept`. Example: trained steps 2, 3 and 7 keep the states
    # 2, 3, 4, 7 and 8 and have the positions 0, 1 and 3.
    kept = sorted(states)
    return Trajectory(
        latents=torch.stack([states[i] for i in kept]) if kept else final.new_empty(0, *final.shape),
        position=torch.tensor([kept.index(i) for i in trained], dtype=torch.long, device=final.device),
        step_index=torch.tensor(trained, dtype=torch.long, device=final.device),
        sigmas=sigmas,
        log_probs=torch.stack(log_probs) if log_probs else final.new_empty(0, len(final)),
        final=final,
    )

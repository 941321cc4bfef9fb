"""Rollout: seeds, the choice of trained steps, where noise enters, and which states are kept."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from deepgen.diffusion.samplers import guided, sampler_step
from deepgen.diffusion.schedule import rollout_sigmas
from deepgen.diffusion.trajectory import (
    Trajectory,
    choose_sde_steps,
    draw_noise,
    sample,
    start_group,
    step_seed,
)
from deepgen.errors import UserError
from deepgen.seeds import sample_seed

SHAPE = (4, 6, 5)
SIGMAS = rollout_sigmas(10)
ETA = {"cps": 1.0, "flow_sde": 0.7, "dance_sde": 0.3}


def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
    """A smooth stand-in for the model that treats each sample separately."""
    assert timesteps.shape == x.shape[:1]
    return torch.tanh(x) * 0.5 + timesteps.reshape(-1, 1, 1, 1) / 1000


def run(
    indices: Sequence[int] = range(4), *, same_noise: bool = False, sampler: str = "cps", **options: Any
) -> Trajectory:
    noise, generators = start_group(SHAPE, run_seed=7, prompt_id="p1", epoch=0, indices=indices, same_noise=same_noise)
    options = {"eta": ETA.get(sampler, 0.0), "sde_steps": [], **options}
    return sample(velocity, noise, SIGMAS, sampler=sampler, generators=generators, **options)


# -- seeds -----------------------------------------------------------------------------------------


def test_seeds_are_stable_distinct_and_63_bit() -> None:
    assert sample_seed(7, "p1", 0, 3) == 9219428685660461298  # a change here makes old runs impossible to repeat
    seeds = {sample_seed(r, p, e, i) for r in (0, 1) for p in ("a", "a1", "b") for e in (0, 1, 11) for i in (0, 1, 11)}
    assert len(seeds) == 54
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, 1) != step_seed(1, 0)


def test_noise_of_a_sample_comes_from_its_own_generator() -> None:
    noise, _ = start_group(SHAPE, run_seed=7, prompt_id="p1", epoch=0, indices=[0, 1, 2, 3])
    other, _ = start_group(SHAPE, run_seed=7, prompt_id="p1", epoch=0, indices=[3, 1])
    assert torch.equal(noise[[3, 1]], other)
    assert not torch.equal(noise[0], noise[1])
    generator = torch.Generator().manual_seed(sample_seed(7, "p1", 0, 2))
    assert torch.equal(noise[2], draw_noise([generator], SHAPE)[0])


def test_same_noise_shares_the_start_only() -> None:
    shared, generators = start_group(SHAPE, run_seed=7, prompt_id="p1", epoch=0, indices=[0, 1], same_noise=True)
    later, _ = start_group(SHAPE, run_seed=7, prompt_id="p1", epoch=0, indices=[5], same_noise=True)
    own, own_generators = start_group(SHAPE, run_seed=7, prompt_id="p1", epoch=0, indices=[0, 1])
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], later[0])
    assert not torch.equal(shared[0], own[0])
    step_noise = draw_noise(generators, SHAPE)
    assert torch.equal(step_noise, draw_noise(own_generators, SHAPE))
    assert not torch.equal(step_noise[0], step_noise[1])


# -- choice of steps -------------------------------------------------------------------------------


def test_a_subset_is_sorted_without_repeats_and_without_the_last() -> None:
    for step in range(50):
        chosen = choose_sde_steps(50, 30, "all", step_seed(0, step))
        assert len(set(chosen)) == 30
        assert chosen == sorted(chosen)
        assert chosen[0] >= 0
        assert chosen[-1] <= 48


def test_all_but_the_last_step_is_the_most() -> None:
    assert choose_sde_steps(10, 9, "all", 0) == choose_sde_steps(10, 9, "window", 0) == list(range(9))
    assert choose_sde_steps(10, 0, "all", 0) == []


def test_a_window_is_contiguous_and_reaches_every_place() -> None:
    starts = set()
    for step in range(200):
        chosen = choose_sde_steps(10, 4, "window", step_seed(0, step))
        assert all(b == a + 1 for a, b in pairwise(chosen))
        assert len(chosen) == 4
        starts.add(chosen[0])
    assert starts == set(range(6))  # 5..8 is the last window that leaves out step 9


@pytest.mark.parametrize("window", ["all", "window"])
def test_the_choice_depends_on_the_seed_alone(window: str) -> None:
    choices = [choose_sde_steps(50, 10, window, step_seed(3, step)) for step in range(20)]
    assert choices == [choose_sde_steps(50, 10, window, step_seed(3, step)) for step in range(20)]
    assert len({tuple(chosen) for chosen in choices}) > 10


def test_the_first_steps_whatever_the_seed() -> None:
    assert [choose_sde_steps(10, 3, "first", seed) for seed in range(5)] == [[0, 1, 2]] * 5


def test_bad_choices() -> None:
    with pytest.raises(UserError, match=r"rollout\.sde_steps: got 10 with 10 steps; allowed: 0 to 9"):
        choose_sde_steps(10, 10, "all", 0)
    with pytest.raises(UserError, match=r"rollout\.sde_window: got 'windw' \(did you mean 'window'\?\)"):
        choose_sde_steps(10, 3, "windw", 0)


# -- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["cps", "flow_sde", "dance_sde", "ode"])
@pytest.mark.parametrize("window", ["all", "window"])
def test_a_sample_is_the_same_bits_in_any_batch(sampler: str, window: str) -> None:
    steps = [] if sampler == "ode" else [2, 3, 6]
    together = run(sampler=sampler, sde_steps=steps, window=window)
    for indices in ([2], [3, 0], [1, 2, 3]):
        part = run(indices, sampler=sampler, sde_steps=steps, window=window)
        assert torch.equal(part.final, together.final[indices])
        assert torch.equal(part.latents, together.latents[:, indices])
        assert torch.equal(part.log_probs, together.log_probs[:, indices])


@pytest.mark.parametrize("sampler", ETA)
def test_scoring_the_trajectory_again_gives_ratio_one(sampler: str) -> None:
    trajectory = run(sampler=sampler, sde_steps=[0, 1, 5, 8])
    for j in range(len(trajectory)):
        step = trajectory.step(j)
        v = velocity(step.latents, (1000 * step.sigma).expand(4))
        again = sampler_step(
            sampler, step.latents, v, step.sigma, step.sigma_next, eta=ETA[sampler], next_x=step.next_latents
        )
        assert torch.equal(again.log_prob, step.log_prob)


def test_kept_states_chain_and_are_stored_once() -> None:
    whole, part = run(sde_steps=list(range(9))), run(sde_steps=[1, 2, 6])
    assert whole.latents.shape == (10, 4, *SHAPE)
    assert part.latents.shape == (5, 4, *SHAPE)  # states 1, 2, 3 and 6, 7
    assert part.position.tolist() == [0, 1, 3]
    assert part.step_index.tolist() == [1, 2, 6]
    for j, index in enumerate([1, 2, 6]):
        mine, full = part.step(j), whole.step(index)
        assert mine.step_index == full.step_index == index
        assert mine.sigma == SIGMAS[index]
        assert mine.sigma_next == SIGMAS[index + 1]
        assert torch.equal(mine.latents, full.latents)
        assert torch.equal(mine.next_latents, full.next_latents)
        assert torch.equal(mine.log_prob, full.log_prob)
    assert torch.equal(whole.final, part.final)


def test_trajectory_is_fp32_movable_and_knows_its_size() -> None:
    trajectory = run(sde_steps=[1, 2])
    assert trajectory.log_probs.dtype == trajectory.latents.dtype == torch.float32
    assert trajectory.nbytes == 4 * (4 * 4 * 120) + 8 * 2 * 2 + 4 * 11 + 4 * 2 * 4
    moved = trajectory.to("meta")
    assert moved.latents.device.type == moved.log_probs.device.type == "meta"


def test_window_mode_is_deterministic_outside_the_window() -> None:
    """All samples start from the same noise, so they may differ only after the window's first step."""
    kept = run(same_noise=True, sde_steps=[4, 5], window="window")
    assert torch.equal(kept.latents[0], kept.latents[0][:1].expand(4, *SHAPE))
    assert not torch.equal(kept.latents[1][0], kept.latents[1][1])
    x = kept.latents[2]
    for i in range(6, 10):
        x = x + velocity(x, (1000 * SIGMAS[i]).expand(4)) * (SIGMAS[i + 1] - SIGMAS[i])
    torch.testing.assert_close(kept.final, x)


@pytest.mark.parametrize(("window", "alone"), [("window", 4), ("all", 0)])
def test_equal_samples_are_computed_once_until_noise_parts_them(window: str, alone: int) -> None:
    batches: list[int] = []

    def counted(x: Tensor, timesteps: Tensor) -> Tensor:
        batches.append(len(x))
        return velocity(x, timesteps)

    noise, generators = start_group(SHAPE, run_seed=7, prompt_id="p1", epoch=0, indices=range(4), same_noise=True)
    request: dict[str, Any] = {"sampler": "cps", "eta": 1.0, "sde_steps": [4, 5], "window": window}
    once = sample(counted, noise, SIGMAS, **request, generators=generators, same_noise=True)
    assert batches == [1] * alone + [4] * (10 - alone)
    _, generators = start_group(SHAPE, run_seed=7, prompt_id="p1", epoch=0, indices=range(4), same_noise=True)
    each = sample(velocity, noise, SIGMAS, **request, generators=generators)
    assert all(torch.equal(a, b) for a, b in zip(vars(once).values(), vars(each).values(), strict=True))


def test_all_mode_is_stochastic_everywhere() -> None:
    kept = run(same_noise=True, sde_steps=[4], window="all")
    assert not torch.equal(kept.latents[0][0], kept.latents[0][1])
    assert torch.equal(kept.final, run(same_noise=True, sde_steps=[], window="all").final)


def test_ode_ignores_the_generators_and_keeps_nothing() -> None:
    first = run(sampler="ode", same_noise=True)
    assert torch.equal(first.final, first.final[:1].expand(4, *SHAPE))
    assert len(first) == 0
    assert first.latents.shape == (0, 4, *SHAPE)
    assert first.log_probs.shape == (0, 4)


def test_guidance_reaches_every_velocity() -> None:
    def opposite(x: Tensor, timesteps: Tensor) -> Tensor:
        return -velocity(x, timesteps)

    def by_hand(x: Tensor, timesteps: Tensor) -> Tensor:
        return guided(velocity(x, timesteps), opposite(x, timesteps), 3.0)

    noise, generators = start_group(SHAPE, run_seed=7, prompt_id="p1", epoch=0, indices=range(4))
    expected = sample(by_hand, noise, SIGMAS, sampler="cps", eta=1.0, sde_steps=[], generators=generators)
    assert torch.equal(run(guidance_scale=3.0, velocity_uncond_fn=opposite).final, expected.final)
    assert torch.equal(run(guidance_scale=1.0, velocity_uncond_fn=opposite).final, run().final)


def test_no_gradient_is_recorded() -> None:
    weight = torch.ones((), requires_grad=True)
    noise, generators = start_group(SHAPE, run_seed=7, prompt_id="p1", epoch=0, indices=[0])
    trajectory = sample(
        lambda x, t: x * weight, noise, SIGMAS, sampler="cps", eta=1.0, sde_steps=[0], generators=generators
    )
    assert not any(tensor.requires_grad for tensor in vars(trajectory).values())


def test_bad_requests() -> None:
    with pytest.raises(UserError, match=r"rollout\.sampler: got 'ode', .* allowed: cps, flow_sde, dance_sde"):
        run(sampler="ode", sde_steps=[1])
    with pytest.raises(UserError, match=r"rollout\.sde_window: got 'some'"):
        run(window="some")
    with pytest.raises(ValueError, match="not all among the 10 steps"):
        run(sde_steps=[10])
    with pytest.raises(ValueError, match="needs velocity_uncond_fn"):
        run(guidance_scale=2.0)
    with pytest.raises(ValueError, match="as many generators"):
        sample(velocity, torch.zeros(2, *SHAPE), SIGMAS, sampler="cps", eta=1.0, sde_steps=[], generators=[])

"""Sampler steps: parity with the reference implementation, and properties that hold for every sampler."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deepgen.diffusion.samplers import StepResult, guided, sampler_step
from deepgen.errors import UserError
from deepgen.registry import SAMPLERS

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz", allow_pickle=False)
REFERENCE_NAMES = {"cps_sde": "cps", "flowgrpo_sde": "flow_sde", "dance_sde": "dance_sde"}
GOLDEN_STEPS = sorted({key.rpartition("/")[0] for key in GOLDEN.files if key.startswith("step/")})
STOCHASTIC = {"cps": 1.0, "flow_sde": 0.7, "dance_sde": 0.3}  # each with a typical eta


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _xv(batch: int = 3) -> tuple[Tensor, Tensor]:
    return _randn(batch, 4, 6, 5, seed=1), _randn(batch, 4, 6, 5, seed=2)


def _draw(name: str, sigma: float | Tensor = 0.8, sigma_next: float | Tensor = 0.6, batch: int = 3) -> StepResult:
    x, v = _xv(batch)
    return sampler_step(name, x, v, sigma, sigma_next, eta=STOCHASTIC[name], noise=_randn(*x.shape, seed=3))


# -- parity ----------------------------------------------------------------------------------------


def test_golden_file_covers_every_stochastic_sampler() -> None:
    assert len(GOLDEN_STEPS) == 32
    assert {REFERENCE_NAMES[key.split("/")[1]] for key in GOLDEN_STEPS} == set(STOCHASTIC)


@pytest.mark.parametrize("key", GOLDEN_STEPS)
def test_step_matches_the_reference(key: str) -> None:
    _, reference, eta, steps, index = key.split("/")
    sigmas, i = GOLDEN[f"sigmas_{steps}"], int(index[1:])
    sigma, sigma_next = float(sigmas[i]), float(sigmas[i + 1])
    x, v, x_next = (torch.from_numpy(GOLDEN[f"{key}/{part}"]) for part in ("x", "v", "x_next"))

    result = sampler_step(REFERENCE_NAMES[reference], x, v, sigma, sigma_next, eta=float(eta[3:]), next_x=x_next)

    # The reference reports Flow-GRPO's std per square root of time, and takes it for its KL. Our std is the step's own.
    scale = math.sqrt(sigma - sigma_next) if reference == "flowgrpo_sde" else 1.0
    np.testing.assert_allclose(result.std, GOLDEN[f"{key}/std"] * scale, rtol=1e-5)
    np.testing.assert_allclose(result.kl_std, GOLDEN[f"{key}/std"], rtol=1e-5)
    np.testing.assert_allclose(result.mean, GOLDEN[f"{key}/mean"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.log_prob, GOLDEN[f"{key}/logp"], rtol=1e-6, atol=1e-6)


# -- properties of all -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCHASTIC)
def test_scoring_what_was_drawn_gives_the_same_bits(name: str) -> None:
    x, v = _xv()
    drawn = _draw(name)
    scored = sampler_step(name, x, v, 0.8, 0.6, eta=STOCHASTIC[name], next_x=drawn.next)
    assert torch.equal(drawn.log_prob, scored.log_prob)
    assert torch.exp(scored.log_prob - drawn.log_prob).eq(1).all()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_draws_have_the_stated_mean_and_std(name: str) -> None:
    x, v = (tensor.expand(20_000, 2, 1, 1) for tensor in (_randn(1, 2, 1, 1, seed=1), _randn(1, 2, 1, 1, seed=2)))
    step = sampler_step(name, x, v, 0.8, 0.6, eta=STOCHASTIC[name], noise=_randn(*x.shape, seed=3))
    std = step.std[0].item()
    torch.testing.assert_close(step.next.mean(0), step.mean[0], atol=4 * std / math.sqrt(20_000), rtol=0)
    torch.testing.assert_close(step.next.std(0), step.std[0].expand(2, 1, 1), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    sigma, sigma_next = torch.tensor([1.0, 0.8, 0.3]), torch.tensor([0.9, 0.6, 0.1])
    x, v = _xv()
    noise = _randn(*x.shape, seed=3)
    together = sampler_step(name, x, v, sigma, sigma_next, eta=STOCHASTIC[name], noise=noise)
    for i in range(3):
        alone = sampler_step(
            name, x[i : i + 1], v[i : i + 1], sigma[i], sigma_next[i], eta=STOCHASTIC[name], noise=noise[i : i + 1]
        )
        for whole, single in zip(together, alone, strict=True):
            assert torch.equal(whole[i], single[0])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_are_fp32_whatever_comes_in(name: str, dtype: torch.dtype) -> None:
    x, v = (tensor.to(dtype) for tensor in _xv())
    noise = None if name == "ode" else _randn(*x.shape, seed=3).to(dtype)
    step = sampler_step(name, x, v, 0.8, 0.6, eta=0.5, noise=noise)
    same = sampler_step(name, x.float(), v.float(), 0.8, 0.6, eta=0.5, noise=None if noise is None else noise.float())
    assert all(tensor.dtype == torch.float32 for tensor in step)
    assert all(torch.equal(a, b) for a, b in zip(step, same, strict=True))
    assert step.log_prob.shape == (3,)
    assert step.std.shape == (3, 1, 1, 1)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_log_prob_pulls_the_mean_towards_the_drawn_state(name: str) -> None:
    x, v = _xv()
    target = _draw(name).next
    v.requires_grad_()
    before = sampler_step(name, x, v, 0.8, 0.6, eta=STOCHASTIC[name], next_x=target)
    (gradient,) = torch.autograd.grad(before.log_prob.sum(), v)
    after = sampler_step(name, x, v.detach() + 1e-2 * gradient, 0.8, 0.6, eta=STOCHASTIC[name], next_x=target)
    assert (after.log_prob > before.log_prob).all()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_drawn_state_is_data_not_a_path_for_gradients(name: str) -> None:
    x, v = _xv()
    noise = _randn(*x.shape, seed=3)
    v.requires_grad_()
    drawn = sampler_step(name, x, v, 0.8, 0.6, eta=STOCHASTIC[name], noise=noise)
    scored = sampler_step(name, x, v, 0.8, 0.6, eta=STOCHASTIC[name], next_x=drawn.next.detach())
    (from_draw,) = torch.autograd.grad(drawn.log_prob.sum(), v)
    (from_score,) = torch.autograd.grad(scored.log_prob.sum(), v)
    assert torch.equal(from_draw, from_score)
    assert from_draw.abs().sum() > 0


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_sampler_tends_to_the_ode(name: str) -> None:
    x, v = _xv()
    ode = sampler_step("ode", x, v, 0.8, 0.6, eta=0.0)
    quiet = sampler_step(name, x, v, 0.8, 0.6, eta=1e-4, noise=torch.zeros_like(x))
    torch.testing.assert_close(quiet.next, ode.next, rtol=1e-5, atol=1e-5)


# -- properties of one -----------------------------------------------------------------------------


def test_cps_with_eta_one_noises_the_guessed_image_from_scratch() -> None:
    x, v = _xv()
    noise = _randn(*x.shape, seed=3)
    step = sampler_step("cps", x, v, 0.8, 0.6, eta=1.0, noise=noise)
    torch.testing.assert_close(step.next, 0.4 * (x - 0.8 * v) + 0.6 * noise)
    other_noise_in_x = sampler_step("cps", x + 0.8 * noise, v + noise, 0.8, 0.6, eta=1.0, noise=noise)
    torch.testing.assert_close(other_noise_in_x.next, step.next, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.2, 0.7, 1.0])
def test_cps_keeps_the_noise_level_exact(eta: float) -> None:
    """With the true velocity, x' is (1 - sigma') image + noise of standard deviation sigma'."""
    image, old = torch.full((4, 100, 50, 5), 0.3), _randn(4, 100, 50, 5, seed=1)
    new = _randn(*old.shape, seed=2)
    step = sampler_step("cps", 0.2 * image + 0.8 * old, old - image, 0.8, 0.6, eta=eta, noise=new)
    rest = step.next - 0.4 * image
    assert rest.mean().item() == pytest.approx(0, abs=0.01)
    assert rest.std().item() == pytest.approx(0.6, rel=0.01)


def test_cps_log_prob_has_no_variance_and_no_normaliser() -> None:
    step = _draw("cps")
    torch.testing.assert_close(step.log_prob, -((step.next - step.mean) ** 2).flatten(1).mean(1))


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_other_log_probs_are_the_gaussian_density(name: str) -> None:
    step = _draw(name)
    density = torch.distributions.Normal(step.mean, step.std.expand_as(step.mean)).log_prob(step.next)
    torch.testing.assert_close(step.log_prob, density.flatten(1).mean(1), rtol=1e-5, atol=1e-5)


def test_flow_sde_survives_the_first_and_last_level() -> None:
    assert all(tensor.isfinite().all() for tensor in _draw("flow_sde", 1.0, 0.96))
    assert all(tensor.isfinite().all() for tensor in _draw("flow_sde", 0.009, 0.0))


def test_ode_recovers_the_image_and_has_log_prob_zero() -> None:
    image, noise = _xv()
    v = noise - image
    step = sampler_step("ode", 0.2 * image + 0.8 * noise, v, 0.8, 0.0, eta=0.0)
    torch.testing.assert_close(step.next, image)
    assert torch.equal(step.log_prob, torch.zeros(3))
    assert torch.equal(step.std, torch.zeros(3, 1, 1, 1))


def test_guidance() -> None:
    cond, uncond = _xv()
    assert guided(cond, uncond, 1.0) is cond
    torch.testing.assert_close(guided(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guided(cond, uncond, 4.0), uncond + 4 * (cond - uncond))


# -- bad input -------------------------------------------------------------------------------------


def test_unknown_sampler_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r"rollout\.sampler: got 'flowsde' \(did you mean 'flow_sde'\?\); allowed: cps"):
        sampler_step("flowsde", *_xv(), 0.8, 0.6, eta=1.0)


@pytest.mark.parametrize(("name", "eta"), [("cps", 0.0), ("cps", 1.1), ("flow_sde", 0.0), ("dance_sde", -1.0)])
def test_eta_out_of_range(name: str, eta: float) -> None:
    x, v = _xv()
    with pytest.raises(UserError, match=r"rollout\.eta: got"):
        sampler_step(name, x, v, 0.8, 0.6, eta=eta, noise=x)


def test_a_step_is_either_drawn_or_scored() -> None:
    x, v = _xv()
    with pytest.raises(ValueError, match="either noise"):
        sampler_step("cps", x, v, 0.8, 0.6, eta=1.0)
    with pytest.raises(ValueError, match="either noise"):
        sampler_step("cps", x, v, 0.8, 0.6, eta=1.0, noise=x, next_x=x)
    with pytest.raises(ValueError, match="deterministic"):
        sampler_step("ode", x, v, 0.8, 0.6, eta=1.0, next_x=x)

"""Losses against values computed by hand, their gradients, and the invariants that a run asserts."""

import math

import pytest
import torch
from torch import Tensor

from deepgen.algorithms.losses import (
    PolicyStep,
    clipped_policy_loss,
    combine,
    flow_matching_loss,
    interpolate,
    kl_divergence,
    kl_latent_mean,
    kl_velocity,
    kl_velocity_scaled,
    negative_aware_loss,
    truncated_importance,
)
from deepgen.diffusion.samplers import sampler_step
from deepgen.errors import UserError
from deepgen.registry import KL_FORMS


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- flow matching ---------------------------------------------------------------------------------


def test_interpolation_reaches_both_ends_and_the_middle() -> None:
    image, noise = _randn(3, 4, 6, 5, seed=1), _randn(3, 4, 6, 5, seed=2)
    mixed = interpolate(image, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(mixed[0], image[0])
    assert torch.equal(mixed[2], noise[2])
    torch.testing.assert_close(mixed[1], 0.75 * image[1] + 0.25 * noise[1])
    torch.testing.assert_close(interpolate(image[1], noise[1], 0.25), mixed[1])
    assert interpolate(image.bfloat16(), noise, 0.5).dtype == torch.bfloat16


def test_the_true_velocity_has_loss_zero_and_carries_noise_to_image() -> None:
    image, noise = _randn(2, 4, 6, 5, seed=1), _randn(2, 4, 6, 5, seed=2)
    assert flow_matching_loss(noise - image, image, noise).loss == 0
    x = interpolate(image, noise, 0.7)
    torch.testing.assert_close(sampler_step("ode", x, noise - image, 0.7, 0.0, eta=0).next, image)


def test_flow_matching_is_mean_per_sample_then_mean() -> None:
    image, noise, v = (_randn(3, 4, 6, 5, seed=s) for s in (1, 2, 3))
    result = flow_matching_loss(v, image, noise)
    torch.testing.assert_close(result.per_sample, ((v - (noise - image)) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(result.loss, result.per_sample.mean())


def test_flow_matching_weighs_images_of_different_sizes_alike() -> None:
    images = [torch.zeros(4, 2, 2), torch.zeros(4, 8, 8)]
    noises = [torch.ones(4, 2, 2), torch.full((4, 8, 8), 3.0)]
    result = flow_matching_loss(images, images, noises)
    assert result.per_sample.tolist() == [1, 9]
    assert result.loss == 5
    with pytest.raises(ValueError, match="zip"):
        flow_matching_loss(images, images, noises[:1])


def test_flow_matching_is_fp32_under_half_precision() -> None:
    result = flow_matching_loss(*(_randn(2, 4, 6, 5, seed=s).bfloat16() for s in (1, 2, 3)))
    assert result.loss.dtype == result.per_sample.dtype == torch.float32


# -- policy ----------------------------------------------------------------------------------------


def test_first_on_policy_ratio_is_exactly_one() -> None:
    x, v = _randn(4, 4, 6, 5, seed=1), _randn(4, 4, 6, 5, seed=2)
    drawn = sampler_step("cps", x, v, 0.8, 0.6, eta=1.0, noise=_randn(4, 4, 6, 5, seed=3))
    v.requires_grad_()
    scored = sampler_step("cps", x, v, 0.8, 0.6, eta=1.0, next_x=drawn.next)
    loss, stats = clipped_policy_loss(scored.log_prob, drawn.log_prob, torch.tensor([1.0, -1.0, 2.0, 0.5]), 1e-4)
    assert stats["ratio_deviation"] == 0
    assert stats["ratio_mean"] == stats["ratio_max"] == 1
    assert stats["clip_share"] == 0
    loss.backward()
    assert v.grad is not None
    assert v.grad.abs().sum() > 0


def test_gradient_on_policy_is_the_policy_gradient() -> None:
    log_prob = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.5, -3.0])
    loss = clipped_policy_loss(log_prob, log_prob.detach(), advantages, 1e-4).loss
    (gradient,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(gradient, -advantages / 2)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (1.0, 1.5, -1.2, 0.0),  # good and already much likelier: stop
        (1.0, 0.5, -0.5, -0.5),  # good and less likely: pull back at full strength
        (-1.0, 0.5, 0.8, 0.0),  # bad and already much less likely: stop
        (-1.0, 1.5, 1.5, 1.5),  # bad and likelier: push away at full strength
        (1.0, 1.1, -1.1, -1.1),  # inside the range
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_clip_cuts_the_gradient_only_where_the_step_is_already_taken(
    advantage: float, ratio: float, loss: float, gradient: float
) -> None:
    log_prob = torch.tensor([ratio]).log().requires_grad_()
    result = clipped_policy_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    (actual,) = torch.autograd.grad(result.loss, log_prob)
    assert result.loss.item() == pytest.approx(loss, abs=1e-6)
    assert actual.item() == pytest.approx(gradient, abs=1e-6)
    assert result.stats["clip_share"].item() == float(gradient == 0 and advantage != 0)


def test_policy_statistics() -> None:
    ratios = torch.tensor([0.5, 1.0, 1.0, 1.3])
    stats = clipped_policy_loss(ratios.log(), torch.zeros(4), torch.tensor([-1.0, 1.0, 1.0, 1.0]), 0.2).stats
    assert {name: round(value.item(), 5) for name, value in stats.items()} == {
        "ratio_mean": 0.95,
        "ratio_max": 1.3,
        "ratio_deviation": 0.5,
        "clip_share": 0.5,
    }
    assert not any(value.requires_grad for value in stats.values())


def test_weights_multiply_each_samples_loss_and_get_no_gradient() -> None:
    ratios, weights = torch.tensor([1.5, 0.5, 1.1]), torch.tensor([0.5, 2.0, 0.0]).requires_grad_()
    log_prob, advantages = ratios.log().requires_grad_(), torch.tensor([1.0, 1.0, -1.0])
    result = clipped_policy_loss(log_prob, torch.zeros(3), advantages, 0.2, weights)
    assert result.loss.item() == pytest.approx((0.5 * -1.2 + 2.0 * -0.5 + 0.0 * 1.1) / 3)
    result.loss.backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([0.0, 2.0 * -0.5, 0.0]) / 3)
    assert weights.grad is None
    plain = clipped_policy_loss(log_prob, torch.zeros(3), advantages, 0.2)
    assert torch.equal(clipped_policy_loss(log_prob, torch.zeros(3), advantages, 0.2, torch.ones(3)).loss, plain.loss)
    assert result.stats == plain.stats  # of the ratios, whatever the weights


def test_policy_loss_refuses_half_precision_and_broadcasting() -> None:
    ones = torch.ones(3)
    with pytest.raises(ValueError, match="float32"):
        clipped_policy_loss(ones, ones.bfloat16(), ones, 1e-4)
    with pytest.raises(ValueError, match="one shape"):
        clipped_policy_loss(ones, ones, torch.ones(3, 1), 1e-4)
    with pytest.raises(ValueError, match="weights must have the shape of log_prob"):
        clipped_policy_loss(ones, ones, ones, 1e-4, torch.ones(1))


def test_decoupled_loss_is_its_formula() -> None:
    """Hilton et al. 2021: the clip is around the proximal policy, the weight leads to it from the behaviour policy."""
    behaviour = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    proximal = behaviour + torch.tensor([0.5, 3.0, 1.0, 0.2]).log()  # importance
    log_prob = (proximal + torch.tensor([1.5, 1.0, 0.5, 1.1]).log()).requires_grad_()  # ratios
    advantages = torch.tensor([1.0, 2.0, -1.0, -2.0])
    weights, stats = truncated_importance(proximal, behaviour, 2.0)
    torch.testing.assert_close(weights, torch.tensor([0.5, 2.0, 1.0, 0.2]))
    assert {name: round(value.item(), 4) for name, value in stats.items()} == {
        "importance_mean": 1.175,
        "importance_max": 3.0,
        "importance_capped_share": 0.25,
    }
    loss = clipped_policy_loss(log_prob, proximal, advantages, 0.2, weights).loss
    by_hand = 0.5 * -1.2 + 2.0 * -2.0 + 1.0 * 0.8 + 0.2 * 2.2
    assert loss.item() == pytest.approx(by_hand / 4)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 2.0 * -2.0, 0.0, 0.2 * 2.2]) / 4)


@pytest.mark.parametrize(("sampler", "power"), [("flow_sde", 1 / 120), ("dance_sde", 1 / 120), ("cps", 2 * 0.36 / 120)])
def test_importance_is_a_power_of_the_quotient_of_densities(sampler: str, power: float) -> None:
    x, v, v_old = (_randn(2, 4, 6, 5, seed=s) for s in (1, 2, 3))
    drawn = sampler_step(sampler, x, v_old, 0.8, 0.6, eta=1.0, noise=_randn(2, 4, 6, 5, seed=4))
    new = sampler_step(sampler, x, v, 0.8, 0.6, eta=1.0, next_x=drawn.next)
    normal = torch.distributions.Normal
    logs = [normal(step.mean, step.std).log_prob(drawn.next).sum((1, 2, 3)) for step in (new, drawn)]
    weights, _ = truncated_importance(new.log_prob, drawn.log_prob, 2.0)
    torch.testing.assert_close(weights, ((logs[0] - logs[1]) * power).exp(), rtol=1e-4, atol=0)


# -- policy, by the forward process ----------------------------------------------------------------


def _forward(v: Tensor, v_old: Tensor, advantages: list[float], beta: float = 0.1, clip: float = 5.0) -> Tensor:
    x0, noise, sigma = _randn(len(v), 4, 6, 5, seed=1), _randn(len(v), 4, 6, 5, seed=2), torch.full((len(v),), 0.6)
    x = interpolate(x0, noise, sigma)
    return negative_aware_loss(v, v_old, x, x0, sigma, torch.tensor(advantages), beta=beta, clip=clip).loss


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_forward_gradient_on_policy_is_flow_matching_times_advantage(beta: float) -> None:
    """The gradient is that of A err / 2: A the clamped advantage, err the image's squared error over its mean size."""
    advantages, clip = [0.5, -2.0, 0.0, 9.0], 5.0
    v = _randn(4, 4, 6, 5, seed=3).requires_grad_()
    (gradient,) = torch.autograd.grad(_forward(v, v.detach(), advantages, beta, clip), v)
    x0, noise = _randn(4, 4, 6, 5, seed=1), _randn(4, 4, 6, 5, seed=2)
    error = 0.6 * ((noise - x0) - v)  # error of the image that v implies
    per_sample = (error**2).mean((1, 2, 3)) / error.detach().abs().mean((1, 2, 3))
    (expected,) = torch.autograd.grad((torch.tensor([0.5, -2.0, 0.0, 5.0]) * per_sample).mean(), v)
    torch.testing.assert_close(gradient, expected)


def test_forward_loss_of_good_samples_pulls_and_of_bad_ones_pushes() -> None:
    x0, noise = _randn(1, 4, 6, 5, seed=1), _randn(1, 4, 6, 5, seed=2)
    target, v_old = noise - x0, _randn(1, 4, 6, 5, seed=3)

    def distance_after(advantage: float) -> float:
        v = v_old.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(_forward(v, v_old, [advantage]), v)
        return float(((v.detach() - 0.1 * gradient - target) ** 2).mean())

    before = float(((v_old - target) ** 2).mean())
    assert distance_after(5.0) < before < distance_after(-5.0)
    assert distance_after(0.0) == pytest.approx(before, rel=1e-5)


def test_forward_loss_holds_back_a_policy_that_moves() -> None:
    """For every advantage the loss is a parabola in v - v_old, so it never pushes v away without limit."""
    v_old, direction = _randn(1, 4, 6, 5, seed=3), _randn(1, 4, 6, 5, seed=4)
    for advantage in (-4.0, 0.0, 4.0):
        near, far = (_forward(v_old + size * direction, v_old, [advantage], beta=1.0) for size in (10, 100))
        assert far > near > _forward(v_old, v_old, [advantage], beta=1.0)


def test_forward_loss_statistics() -> None:
    v, v_old, zeros = torch.ones(2, 4, 6, 5), torch.zeros(2, 4, 6, 5), torch.zeros(2, 4, 6, 5)
    result = negative_aware_loss(
        v, v_old, zeros, zeros, torch.full((2,), 0.5), torch.tensor([5.0, 0.0]), beta=0.1, clip=5.0
    )
    assert result.stats["positive_share"] == 0.75
    assert not any(value.requires_grad for value in result.stats.values())


# -- distance from the reference model -------------------------------------------------------------


def _step(seed: int, std: float = 0.5) -> PolicyStep:
    stds = torch.full((2, 1, 1, 1), std)
    return PolicyStep(_randn(2, 4, 6, 5, seed=seed), _randn(2, 4, 6, 5, seed=seed + 1), stds, stds)


@pytest.mark.parametrize("name", KL_FORMS)
@pytest.mark.parametrize("std", [0.9, 1e-3, 0.0])
def test_kl_of_a_model_with_itself_is_exactly_zero(name: str, std: float) -> None:
    step = _step(1, std)
    assert torch.equal(kl_divergence(name, step, step), torch.zeros(2))


@pytest.mark.parametrize("name", KL_FORMS)
def test_kl_pulls_towards_the_reference(name: str) -> None:
    new, reference = _step(1), _step(5)
    moving = new._replace(velocity=new.velocity.requires_grad_(), mean=new.mean.requires_grad_())
    kl = kl_divergence(name, moving, reference)
    assert kl.shape == (2,)
    assert (kl > 0).all()
    kl.sum().backward()
    with torch.no_grad():
        nearer = moving._replace(
            **{
                field: tensor - 0.1 * tensor.grad
                for field, tensor in (("velocity", moving.velocity), ("mean", moving.mean))
                if tensor.grad is not None
            }
        )
    assert (kl_divergence(name, nearer, reference) < kl).all()


def test_the_two_velocity_forms_differ_by_the_variance() -> None:
    v, v_ref = _randn(2, 4, 6, 5, seed=1), _randn(2, 4, 6, 5, seed=2)
    std = torch.tensor([0.9, 0.2]).reshape(2, 1, 1, 1)
    plain = kl_velocity(v, v_ref)
    torch.testing.assert_close(plain, ((v - v_ref) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(kl_velocity_scaled(v, v_ref, std), plain / (2 * std.flatten() ** 2 + 1e-7))


# What the reference divides by in a step from 0.8 to 0.6 with eta 0.7 (its sde_step_with_logprob returns it), and the
# std of that step. They differ for flow_sde.
COEFFICIENTS = {
    "cps": (0.6 * math.sin(0.35 * math.pi), 1.0),
    "flow_sde": (0.7 * math.sqrt(0.8 / 0.2), math.sqrt(0.2)),
    "dance_sde": (0.7 * math.sqrt(0.2), 1.0),
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_scaled_forms_against_the_reference(name: str) -> None:
    """Scaled velocities are the reference's for every sampler; of means it is the Gaussian KL of the steps."""
    x, v, v_ref = (_randn(2, 4, 6, 5, seed=s) for s in (1, 2, 3))
    coefficient, step_by_coefficient = COEFFICIENTS[name]

    def score(velocity: Tensor) -> PolicyStep:
        step = sampler_step(name, x, velocity, 0.8, 0.6, eta=0.7, next_x=x)
        return PolicyStep(velocity, step.mean, step.std, step.kl_std)

    def reference_form(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b) ** 2 / (2 * coefficient**2 + 1e-7)).mean((1, 2, 3))

    new, old = score(v), score(v_ref)
    scaled, means = kl_divergence("velocity_scaled", new, old), kl_divergence("latent_mean", new, old)
    torch.testing.assert_close(scaled, reference_form(v, v_ref), rtol=1e-5, atol=0)
    torch.testing.assert_close(means * step_by_coefficient**2, reference_form(new.mean, old.mean), rtol=1e-5, atol=0)
    steps = (torch.distributions.Normal(one.mean, coefficient * step_by_coefficient) for one in (new, old))
    exact = torch.distributions.kl_divergence(*steps).mean((1, 2, 3))
    torch.testing.assert_close(means, exact, rtol=1e-5, atol=1e-6)


def test_for_cps_both_scaled_forms_agree_up_to_the_step() -> None:
    """mean depends on v through -(1 - sigma') sigma at eta 1, so the two KLs differ by that factor squared."""
    x, v, v_ref = (_randn(2, 4, 6, 5, seed=s) for s in (1, 2, 3))
    new, ref = (sampler_step("cps", x, velocity, 0.8, 0.6, eta=1.0, next_x=x) for velocity in (v, v_ref))
    latent = kl_latent_mean(new.mean, ref.mean, new.std)
    torch.testing.assert_close(latent, kl_velocity_scaled(v, v_ref, new.std) * (0.4 * 0.8) ** 2, rtol=1e-4, atol=0)


def test_unknown_kl_form() -> None:
    with pytest.raises(UserError, match=r"algorithm\.kl: got 'velocty' \(did you mean 'velocity'\?\)"):
        kl_divergence("velocty", _step(1), _step(1))


# -- total -----------------------------------------------------------------------------------------


def test_combine() -> None:
    policy, kl, sft = torch.tensor(2.0), torch.tensor(10.0), torch.tensor(5.0)
    assert combine(policy, kl, 0.1, sft, 0.25).item() == pytest.approx(0.75 * 3 + 0.25 * 5)
    assert combine(policy, kl, 0.0, sft, 0.0) == policy
    parts = combine(policy, kl, 0.1, 0.0, 0.25) + combine(torch.zeros(()), 0.0, 0.1, sft, 0.25)
    torch.testing.assert_close(parts, combine(policy, kl, 0.1, sft, 0.25))

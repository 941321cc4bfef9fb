"""Both policy losses on one group: its parts add up to the whole, and the KL term pulls back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.experience.policy.policy_sampler import Samples, trained_steps
from actors.learner.protocols import StepContext
from actors.messages import Group
from actors.objectives.policy_losses import ClippedRatio
from deepgen.config import Settings, load_settings
from deepgen.data.records import Record
from deepgen.diffusion.schedule import rollout_sigmas
from deepgen.diffusion.trajectory import sample, start_group
from deepgen.models.unified import Conditioning
from deepgen.registry import POLICY_LOSSES

SHAPE = (2, 4, 4)
CONTEXT = StepContext(1, 3, 0, 1, torch.device("cpu"))
OWN = {
    "clipped_ratio": [],
    "diffusion_nft": ["algorithm.policy_loss=diffusion_nft", "rollout.sampler=ode", "rollout.same_noise=false"],
}


class Dit(nn.Module):
    """A model whose velocity is proportional to the latents."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return self.weight * x


def make(name: str, *more: str) -> tuple[Settings, Group, Samples]:
    common = ["rollout.num_steps=5", "rollout.sde_steps=2", "rollout.eta=0.7", "rollout.group_size=4"]
    settings = load_settings(None, [*common, "algorithm.update_micro_batch=3", *OWN[name], *more])
    noise, generators = start_group(SHAPE, run_seed=1, prompt_id="p", epoch=0, indices=range(4))
    trajectory = sample(
        lambda x, t: 0.5 * x,
        noise,
        rollout_sigmas(5),
        sampler=settings.rollout.sampler,
        eta=0.7,
        sde_steps=trained_steps(settings, 3) if name == "clipped_ratio" else [],
        generators=generators,
    )
    advantages = np.array([1.0, -1.0, 0.5, -0.5], dtype=np.float32)
    conditioning = Conditioning(torch.zeros(1, 3, 8), torch.zeros(1, 8), None)
    record = Record("p", "t2i", "", "", None, (), "")
    group = Group(0, 3, 0, record, version=3, advantages=advantages)
    return settings, group, Samples(trajectory, conditioning, None, [])


def total(name: str, *more: str) -> Tensor:
    """Gradient of a group's loss with respect to the DiT's weight."""
    settings, group, samples = make(name, *more)
    term, dit, reference = POLICY_LOSSES[name](settings), Dit(0.5), Dit(0.3)
    for micro in term.micros(group, samples, 3, 0.25, 0):
        (micro.share * term.loss(dit, reference, micro, CONTEXT).total).backward()
    assert dit.weight.grad is not None and reference.weight.grad is None
    return dit.weight.grad


@pytest.mark.parametrize(("form", "by_the_step"), [("velocity_scaled", False), ("latent_mean", True)])
def test_the_scaled_kl_of_a_flow_sde(form: str, by_the_step: bool) -> None:
    """The reference's form divides by the squared diffusion coefficient, the KL of the steps by their variance."""
    settings, group, samples = make("clipped_ratio", "rollout.sampler=flow_sde", f"algorithm.kl={form}")
    for micro in ClippedRatio(settings).micros(group, samples, 3, 1.0, 0):
        kl = ClippedRatio(settings).loss(Dit(0.5), Dit(0.3), micro, CONTEXT).metrics["policy/kl"]
        sigma, dt = micro.sigma, micro.sigma - micro.sigma_next
        q = 0.7**2 * sigma / (1 - torch.where(sigma == 1, micro.sigma_next, sigma))
        apart = 0.2 * micro.x
        if by_the_step:
            apart, q = (1 + q * (1 - sigma) / (2 * sigma)).view(-1, 1, 1, 1) * dt.view(-1, 1, 1, 1) * apart, q * dt
        expected = (apart**2 / (2 * q.view(-1, 1, 1, 1) + 1e-7)).mean()
        torch.testing.assert_close(torch.as_tensor(kl), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("spoilt", ["advantages", "latents"])
def test_what_is_nan_in_a_batch_reaches_the_loss(name: str, spoilt: str) -> None:
    """The loop then names it and saves the batch; the checks of the first update do not come before that."""
    settings, group, samples = make(name)
    if spoilt == "advantages":
        group = replace(group, advantages=np.array([1.0, np.nan, 0.5, -0.5], dtype=np.float32))
    elif name == "clipped_ratio":
        samples.trajectory.log_probs[:, 1] = torch.nan
    else:
        samples.trajectory.final[1] = torch.nan
    term, losses = POLICY_LOSSES[name](settings), list[float]()
    for step in (0, 3):
        for micro in term.micros(replace(group, version=step), samples, step, 1.0, 0):
            context = replace(CONTEXT, step=step)
            losses.append(float(term.loss(Dit(0.5), Dit(0.5), micro, context).total.detach()))
    assert np.isnan(losses).any()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_group_is_split_and_adds_up(name: str) -> None:
    settings, group, samples = make(name)
    micros = list(POLICY_LOSSES[name](settings).micros(group, samples, 3, 0.25, 0))
    assert [len(micro.x) for micro in micros] == [3, 3, 2]
    assert sum(micro.share for micro in micros) == pytest.approx(0.25)
    assert sum(micro.images for micro in micros) == pytest.approx(4)
    advantages = torch.cat([micro.advantage for micro in micros])
    assert advantages.tolist() == [1.0, -1.0, 0.5, -0.5] * 2
    levels = rollout_sigmas(5)[trained_steps(settings, 3)].repeat_interleave(4)
    torch.testing.assert_close(torch.cat([micro.sigma for micro in micros]), levels)
    torch.testing.assert_close(total(name), total(name, "algorithm.update_micro_batch=8"))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_kl_pulls_towards_the_reference(name: str) -> None:
    assert total(name, "algorithm.kl_beta=1") > total(name, "algorithm.kl_beta=0")

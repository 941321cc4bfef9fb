"""Noise levels against diffusers' grid and against values computed by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deepgen.diffusion.schedule import draw_training_sigmas, rollout_sigmas, timesteps, training_sigmas
from deepgen.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz", allow_pickle=False)


@pytest.mark.parametrize("num_steps", [10, 50])
def test_rollout_grid_matches_the_reference(num_steps: int) -> None:
    sigmas = rollout_sigmas(num_steps)
    np.testing.assert_allclose(sigmas, GOLDEN[f"sigmas_T{num_steps}"], rtol=1e-5)
    np.testing.assert_allclose(timesteps(sigmas)[:-1], GOLDEN[f"timesteps_T{num_steps}"], rtol=1e-5)


def test_training_grid_is_the_shifted_line() -> None:
    sigmas = training_sigmas(3.0)
    assert sigmas.shape == (1000,)
    assert sigmas.dtype == torch.float32
    assert sigmas[0] == 1
    assert sigmas[-1].item() == pytest.approx(0.003 / 1.002)
    assert sigmas[500].item() == pytest.approx(3 * 0.5 / 2)
    torch.testing.assert_close(training_sigmas(1.0), torch.arange(1000, 0, -1) / 1000)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_rollout_grid_falls_from_one_to_zero(num_steps: int) -> None:
    sigmas = rollout_sigmas(num_steps)
    assert len(sigmas) == num_steps + 1
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_training_draws_are_grid_entries_and_repeatable() -> None:
    first, second = (draw_training_sigmas(5000, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.isin(first, training_sigmas()).all()
    assert first.mean().item() == pytest.approx(training_sigmas().mean().item(), abs=0.02)


def test_no_steps_is_an_error() -> None:
    with pytest.raises(UserError, match=r"rollout\.num_steps: got 0"):
        rollout_sigmas(0)

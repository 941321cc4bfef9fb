"""The rules that settings check without torch agree with the algorithms."""

from __future__ import annotations

import math

import pytest

from deepgen.algorithms.rules import (
    ADVANTAGES_WITHOUT_GROUPS,
    DETERMINISTIC_SAMPLERS,
    ETA_MAX,
    RANDOM_WINDOWS,
    check_truncation,
    noise_level,
)
from deepgen.config import UserError, load_settings
from deepgen.diffusion.schedule import rollout_sigmas
from deepgen.diffusion.trajectory import choose_sde_steps
from deepgen.registry import ADVANTAGES, KL_FORMS, POLICY_LOSSES, SAMPLERS, SDE_WINDOWS, Registry

REGISTRIES = (ADVANTAGES, KL_FORMS, POLICY_LOSSES, SAMPLERS, SDE_WINDOWS)


def test_rules_agree_with_the_samplers() -> None:
    assert tuple(name for name, sampler in SAMPLERS.items() if not sampler.stochastic) == DETERMINISTIC_SAMPLERS
    assert {name: s.eta_max for name, s in SAMPLERS.items() if s.eta_max < math.inf} == ETA_MAX


def test_rules_name_registered_algorithms() -> None:
    assert set(ADVANTAGES_WITHOUT_GROUPS) <= set(ADVANTAGES)


@pytest.mark.parametrize(("num_steps", "shift"), [(50, 3.0), (3, 3.0), (2, 1.0)])
def test_rules_know_the_noise_levels(num_steps: int, shift: float) -> None:
    levels = [noise_level(i, num_steps, shift) for i in range(num_steps)]
    assert levels == pytest.approx(rollout_sigmas(num_steps, shift)[:-1].tolist(), rel=1e-6)


@pytest.mark.parametrize("window", SDE_WINDOWS)
def test_truncation_is_refused_where_a_step_could_lose_all_it_trains(window: str) -> None:
    """The limit is the most that leaves something to train for every seed."""
    sigmas = rollout_sigmas(8, 3.0)
    choices = [choose_sde_steps(8, 3, window, seed) for seed in range(300)]
    limit = min(max(float(sigmas[step + 1]) for step in steps) for steps in choices)
    check_truncation(limit - 1e-6, 8, 3.0, 3, window)
    with pytest.raises(UserError, match=r"algorithm\.off_policy_min_sigma: got .*allowed: 0 to 0\.") as caught:
        check_truncation(limit + 1e-6, 8, 3.0, 3, window)
    assert abs(float(str(caught.value).rpartition(" ")[2]) - limit) < 1e-4
    assert (window in RANDOM_WINDOWS) == (len({*map(tuple, choices)}) > 1)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.key)
def test_each_name_has_code_and_the_settings_take_it(registry: Registry) -> None:
    section, key = registry.key.split(".")
    for name, code in registry.items():
        assert code is registry.load(name)
        settings = load_settings(None, [f"{registry.key}={name}"])
        assert getattr(getattr(settings, section), key) == name


def test_own_algorithm_is_chosen_by_its_path() -> None:
    settings = load_settings(None, ["algorithm.advantage=deepgen.algorithms.advantages:gdpo"])
    assert ADVANTAGES.load(settings.algorithm.advantage) is ADVANTAGES["gdpo"]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("gdpoo", "got 'gdpoo' (did you mean 'gdpo'?); allowed: gdpo, grpo"),
        ("no.such:function", "there is no module 'no' for 'no.such:function'"),
        ("deepgen.nothing:gdpo", "there is no module 'deepgen.nothing'"),
        ("deepgen.algorithms.advantages:gdpoo", "has no 'gdpoo'; did you mean 'deepgen.algorithms.advantages:gdpo'"),
        ("deepgen.algorithms:gdpo:x", "allowed: gdpo, grpo"),
    ],
)
def test_wrong_name_or_path_is_one_line(given: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        ADVANTAGES.load(given)
    assert str(caught.value).startswith("algorithm.advantage: ") and part in str(caught.value)
    assert "\n" not in str(caught.value)

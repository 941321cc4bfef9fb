"""Checks before a stage starts: its settings must fit together, and its inputs must exist."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deepgen.algorithms.rules import (
    check_exploration,
    check_kl,
    check_off_policy,
    check_truncation,
    check_updates,
)
from deepgen.config.schema.paths import CHECKOUT, exists, resolve_path
from deepgen.config.schema.sections import HACKING_PROMPTS
from deepgen.config.settings import Settings
from deepgen.errors import UserError
from deepgen.models.stage_parts import Stage
from deepgen.registry import ADVANTAGES, KL_FORMS, POLICY_LOSSES, SAMPLERS, SDE_WINDOWS


def check_stage(settings: Settings, stage: Stage) -> None:
    """Raise UserError if settings do not work together in this stage."""
    if stage != "rl":
        return
    rollout, train, algorithm = settings.rollout, settings.train, settings.algorithm
    _check_own_code(settings)
    check_exploration(algorithm.policy_loss, rollout.sampler, rollout.eta, same_noise=rollout.same_noise)
    check_kl(algorithm.policy_loss, algorithm.kl)
    if rollout.prompts_per_step % train.workers:
        raise UserError(
            f"rollout.prompts_per_step: got {rollout.prompts_per_step} for train.workers {train.workers}; "
            f"allowed: a multiple of {train.workers}, so that each rank gets as many groups"
        )
    _check_off_policy(settings)
    if not any(map(settings.rewards.tasks_of, settings.rewards.used())):
        raise UserError("rewards.weights: got no weight above 0; allowed: at least one reward for some task")
    _check_guard(settings)


def _check_guard(settings: Settings) -> None:
    """A guard that is asked to act must have something to look at."""
    action = settings.tracking.action("hacking")
    if action == "report":
        return
    missing = {
        "rewards.weights.held_out": not settings.rewards.held_out(),
        "evaluation.every": not settings.evaluation.every,
        "evaluation.prompts": settings.evaluation.prompts < HACKING_PROMPTS,
    }
    if keys := [key for key, is_missing in missing.items() if is_missing]:
        raise UserError(
            f"tracking.alarms.hacking: got {action} without {' and '.join(keys)}; allowed: held-out rewards and "
            f"evaluations during the run, of at least {HACKING_PROMPTS} prompts, or no action"
        )


def _check_off_policy(settings: Settings) -> None:
    """Several updates a batch, and corrections for samples of an older policy."""
    rollout, algorithm, data = settings.rollout, settings.algorithm, settings.data
    check_updates(
        algorithm.updates_per_batch,
        rollout.prompts_per_step,
        settings.train.workers,
        algorithm.sft_batch if algorithm.sft_coef else None,
        data.edit_per_cycle + data.t2i_per_cycle,
    )
    check_off_policy(algorithm.policy_loss, algorithm.off_policy_min_sigma, decoupled=algorithm.decoupled_loss)
    check_truncation(
        algorithm.off_policy_min_sigma, rollout.num_steps, rollout.shift, rollout.sde_steps, rollout.sde_window
    )


def _check_own_code(settings: Settings) -> None:
    """Import the objects chosen by import path, so that a wrong path raises UserError now and not in an actor."""
    for registry in (ADVANTAGES, POLICY_LOSSES, KL_FORMS, SAMPLERS, SDE_WINDOWS):
        section, _, name = registry.key.partition(".")
        given = getattr(getattr(settings, section), name)
        if ":" in given:
            registry.load(given)


def check_inputs(settings: Settings, stage: Stage) -> None:
    """Raise UserError, naming the key, if a file or folder that this stage reads is missing."""
    needed = {"model.weights": settings.model.weights}
    if stage != "rl" or settings.algorithm.sft_coef > 0:
        needed["data.train"] = settings.data.train
    if settings.evaluation.prompts:
        needed["data.heldout"] = settings.data.heldout
    if stage == "rl":
        needed["data.prompts"] = settings.data.prompts
        for name in settings.rewards.used():
            needed |= settings.rewards.pools[name].input_paths()
    require_paths(needed)


def require_paths(needed: Mapping[str, Path]) -> None:
    """Raise UserError, naming the key, for the first of these files and folders that is missing."""
    for key, path in needed.items():
        if not exists(resolve_path(path)):
            places = [] if path.is_absolute() else [Path.cwd(), *([CHECKOUT] if CHECKOUT else [])]
            looked = f" in {' or '.join(dict.fromkeys(map(str, places)))}" if places else ""
            without = "; without held-out records: evaluation.prompts=0" if key == "data.heldout" else ""
            raise UserError(f"{key}: no file or folder {str(path)!r}{looked}{without}")

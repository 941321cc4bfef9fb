"""Rules for combining algorithms. Imports no torch, because the settings check them before anything starts.

An algorithm given as an import path is assumed to need what most need: noise for a sampler, groups for an advantage.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from deepgen.errors import UserError

DETERMINISTIC_SAMPLERS = ("ode",)  # no noise, so their steps have no log-probabilities
WHITEN = {"global": "the whole batch", "rank": "each rank's samples", "none": "not at all"}  # algorithm.whiten
ETA_MAX = {"cps": 1.0}  # largest eta, for samplers that have a limit
ADVANTAGES_WITHOUT_GROUPS = ("reinforcepp",)  # compare a sample with the whole batch
LOSSES_OF_FINISHED_SAMPLES = ("diffusion_nft",)  # train no sampler steps and accept any sampler
KL_OF_VELOCITIES = ("velocity", "none")  # need no variance of a sampler step
GROUPWISE_ADVANTAGES = ("gdpo", "grpo")  # centred in their groups; the rest of the batch gives one factor at most
LINEAR_LOSSES = ("clipped_ratio",)  # a multiple of the advantages multiplies the loss, whatever is clipped
RANDOM_WINDOWS = ("all", "window")  # trained steps differ from one training step to the next
_TRAIN_STEPS = 1000  # as in `deepgen.diffusion.schedule`


class Overlap(NamedTuple):
    """How the groups of an on-policy step reach the learner.

    pieces: one by one, as soon as they are scored. held: their policy gradients wait for the whitening factor of the
    batch. why: a sentence for the console.
    """

    pieces: bool
    held: bool
    why: str


def choose_overlap(
    wanted: str,
    *,
    max_staleness: int,
    updates: int,
    advantage: str,
    whiten: str,
    policy_loss: str,
    kl: bool,
    zero_stage: int,
) -> Overlap:
    """Whether the learner can start on a group before the last one of its step has been scored.

    A group's own part of an advantage is known with its scores. What the batch adds to it is one positive factor,
    because every reward is centred in its group (the mean of the batch is 0). A loss that is linear in the advantage
    therefore takes the factor at the end, on its summed gradient (method 3.5). Everything that the factor does not
    belong to needs a backward pass of its own then, which is why "auto" waits if there is a KL term.
    """
    factor = advantage == "gdpo" and whiten != "none"
    why = ""
    if wanted == "off":
        why = "experience.overlap is off"
    elif max_staleness:
        why = f"experience.max_staleness {max_staleness} overlaps whole steps already"
    elif updates > 1:
        why = f"algorithm.updates_per_batch {updates} needs the final advantages for its first update"
    elif advantage not in GROUPWISE_ADVANTAGES:
        why = f"algorithm.advantage {advantage} compares the samples of the whole batch"
    elif factor and whiten == "rank":
        why = "algorithm.whiten rank has a factor for each rank"
    elif factor and policy_loss not in LINEAR_LOSSES:
        why = f"algorithm.policy_loss {policy_loss} is not linear in the advantages that algorithm.whiten scales"
    elif factor and zero_stage == 3:
        why = "train.zero_stage 3 cannot hold back the gradients that algorithm.whiten scales"
    elif factor and kl and wanted == "auto":
        why = "groups one by one would cost a second backward pass beside the KL (experience.overlap=on does it)"
    if why:
        return Overlap(False, False, f"the learner waits for whole batches: {why}")
    return Overlap(True, factor, "the learner starts on each group when it is scored")


def check_noise(sampler: str, eta: float) -> None:
    """Raise ValueError if a sampler cannot use this noise level."""
    if eta > ETA_MAX.get(sampler, eta):
        raise ValueError(
            f"rollout.eta: got {eta:g} with rollout.sampler {sampler}; allowed: > 0 and <= {ETA_MAX[sampler]:g}"
        )


def check_group(advantage: str, group_size: int, prompts_per_step: int) -> None:
    """Raise ValueError if an advantage has too few samples to compare."""
    if advantage not in ADVANTAGES_WITHOUT_GROUPS and group_size < 2:
        raise ValueError(
            f"rollout.group_size: got {group_size} with algorithm.advantage {advantage}, which compares the images of "
            "a group; allowed: >= 2"
        )
    if group_size * prompts_per_step < 2:
        raise ValueError(
            "rollout.group_size and rollout.prompts_per_step: got 1 and 1; allowed: at least 2 images a step"
        )


def check_exploration(policy_loss: str, sampler: str, eta: float, *, same_noise: bool) -> None:
    """Raise UserError if the samples of a group would teach this policy loss nothing."""
    if sampler not in DETERMINISTIC_SAMPLERS:
        if eta == 0:
            raise UserError("rollout.eta: got 0, which leaves no noise to explore with; allowed in rl: number > 0")
        return
    if policy_loss not in LOSSES_OF_FINISHED_SAMPLES:
        raise UserError(
            f"rollout.sampler: got {sampler!r}, which has no log-probabilities for algorithm.policy_loss "
            f"{policy_loss}; allowed in rl: cps, flow_sde or dance_sde, or algorithm.policy_loss=diffusion_nft"
        )
    if same_noise:
        raise UserError(
            f"rollout.same_noise: got true with rollout.sampler {sampler}, so that all images of a group would be "
            "equal; allowed in rl: false"
        )


def check_kl(policy_loss: str, kl: str) -> None:
    """Raise UserError if a policy loss lacks what the KL form needs."""
    if policy_loss in LOSSES_OF_FINISHED_SAMPLES and kl not in KL_OF_VELOCITIES:
        raise UserError(
            f"algorithm.kl: got {kl!r} with algorithm.policy_loss {policy_loss}, which trains no sampler steps and so "
            f"has no variance of one; allowed: {' or '.join(KL_OF_VELOCITIES)}"
        )


# -- several updates a batch, and samples of an older policy (docs/algorithms.md, Off-policy) -----------------------


def check_updates(updates: int, prompts_per_step: int, workers: int, sft_batch: int | None, cycle: int) -> None:
    """Raise UserError if a rank's groups or auxiliary records can't be split into as many mini-batches.

    sft_batch: None without an auxiliary loss. cycle: its micro-batches, each of which is split.
    """
    groups = prompts_per_step // workers
    if groups % updates:
        raise UserError(
            f"algorithm.updates_per_batch: got {updates} with rollout.prompts_per_step {prompts_per_step} and "
            f"train.workers {workers}, {groups} groups a rank; allowed: a divisor of {groups}"
        )
    if updates > 1 and sft_batch is not None and sft_batch < updates * cycle:
        raise UserError(
            f"algorithm.sft_batch: got {sft_batch} with algorithm.updates_per_batch {updates} and {cycle} "
            f"micro-batches a cycle; allowed: >= {updates * cycle}, a record of each of them in each update"
        )


def check_off_policy(policy_loss: str, min_sigma: float, *, decoupled: bool) -> None:
    """Raise UserError if a correction for off-policy samples is asked of a loss without probability ratios."""
    if policy_loss not in LOSSES_OF_FINISHED_SAMPLES:
        return
    for key, given, allowed in (
        ("decoupled_loss", decoupled, "false"),
        ("off_policy_min_sigma", min_sigma, "0"),
    ):
        if given:
            raise UserError(
                f"algorithm.{key}: got {str(given).lower()} with algorithm.policy_loss {policy_loss}, which has no "
                f"probability ratios; allowed: {allowed}, or algorithm.policy_loss=clipped_ratio"
            )


def noise_level(index: int, num_steps: int, shift: float) -> float:
    """Entry ``index`` < ``num_steps`` of `deepgen.diffusion.schedule.rollout_sigmas`, which needs torch."""

    def shifted(u: float) -> float:
        return shift * u / (1 + (shift - 1) * u)

    last = shifted(1 / _TRAIN_STEPS)
    return shifted(1 + (last - 1) * index / (num_steps - 1))


def check_truncation(min_sigma: float, num_steps: int, shift: float, sde_steps: int, window: str) -> None:
    """Raise UserError if algorithm.off_policy_min_sigma could leave out every trained step of a training step.

    The least favourable choice is looked at: the last `sde_steps` steps that can be trained. Only the learner can check
    a window of your own.
    """
    first = {"first": 0} | dict.fromkeys(RANDOM_WINDOWS, num_steps - 1 - sde_steps)
    if window not in first:
        return
    level = noise_level(first[window] + 1, num_steps, shift)
    if min_sigma > level:
        raise UserError(
            f"algorithm.off_policy_min_sigma: got {min_sigma:g}, but all trained steps may end below it with "
            f"rollout.num_steps {num_steps}, rollout.shift {shift:g}, rollout.sde_steps {sde_steps} and "
            f"rollout.sde_window {window}; allowed: 0 to {math.floor(level * 1e4) / 1e4:g}"
        )

"""The advantages of a step's groups, as the stream computes them for the learner and a replay computes them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from actors.experience.step_metrics import stacked_scores
from actors.messages import Group
from deepgen.config import Settings

if TYPE_CHECKING:
    from deepgen.algorithms.advantages import AdvantageResult


def step_advantages(settings: Settings, groups: Sequence[Group]) -> AdvantageResult:
    """Advantages over all groups of a step together: they do not depend on the number of ranks."""
    algorithm = settings.algorithm
    return _advantages(settings, groups, algorithm.whiten, algorithm.advantage_clip)


def own_advantages(settings: Settings, group: Group) -> np.ndarray:
    """A group's own part of the advantages, float32 [G], for a learner that takes the groups one by one."""
    clip = None if settings.overlap().held else settings.algorithm.advantage_clip
    own: np.ndarray = _advantages(settings, [group], "none", clip).advantages.numpy()
    return own


def factor_and_clamped(settings: Settings, advantages: np.ndarray, factor: float) -> tuple[float, int]:
    """`RankBatch.factor` and `RankBatch.clamped` of a step with final `advantages` [groups, G]."""
    if not settings.overlap().held:
        return 1.0, 0
    world, limit = settings.train.workers, settings.algorithm.advantage_clip
    over = [bool((np.abs(row) >= limit).any()) for row in advantages]
    return factor, max(sum(over[rank::world]) for rank in range(world))


def _advantages(settings: Settings, groups: Sequence[Group], whiten: str, clip: float | None) -> AdvantageResult:
    import torch

    from deepgen.algorithms.advantages import group_advantages

    scores = stacked_scores(groups)  # [groups, G, K]
    size, rewards = scores.shape[1:]
    return group_advantages(
        settings.algorithm.advantage,
        torch.from_numpy(scores.reshape(-1, rewards)),
        torch.from_numpy(np.repeat(np.stack([group.reward_weights for group in groups]), size, axis=0)),
        torch.arange(len(groups)).repeat_interleave(size),
        whiten=whiten,
        rank_ids=(torch.arange(len(groups)) % settings.train.workers).repeat_interleave(size),
        clip=clip,
    )

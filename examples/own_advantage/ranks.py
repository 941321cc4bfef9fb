"""An advantage of one's own: who is better than whom in a group, not by how much."""

import torch
from torch import Tensor

from deepgen.algorithms.advantages import Scores, normalise


def ranks(scores: Scores) -> tuple[Tensor, Tensor]:
    """Share of its group that a sample beats, less the share that beats it: from -1 for the worst to 1 for the best.

    One image that a reward rates out of all proportion then weighs no more than any other best one.

    Returns:
        The combined signal [N], by which samples are compared (as `gdpo` makes it), and the advantages [N].
    """
    normalised, _ = normalise(scores.rewards, scores.present, scores.groups, scores.eps)  # [N, K]
    combined = (scores.weights * normalised).sum(dim=1)
    siblings = scores.groups[:, None] == scores.groups[None, :]  # [N, N]
    siblings &= scores.usable[None, :]
    balance = torch.sign(combined[:, None] - combined[None, :]) * siblings
    return combined, balance.sum(dim=1) / (siblings.sum(dim=1) - 1).clamp(min=1)

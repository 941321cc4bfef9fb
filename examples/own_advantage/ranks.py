"""A custom advantage: it counts which samples of a group are better, not by how much."""

import torch
from torch import Tensor

from deepgen.algorithms.advantages import Scores, normalise


def ranks(scores: Scores) -> tuple[Tensor, Tensor]:
    """The share of its group that a sample beats, minus the share that beats it: -1 for the worst, 1 for the best.

    An image with an extreme reward then counts no more than the best image of any other group.

    Returns:
        The combined signal [N] by which samples are compared (computed as in `gdpo`), and the advantages [N].
    """
    normalised, _ = normalise(scores.rewards, scores.present, scores.groups, scores.eps)  # [N, K]
    combined = (scores.weights * normalised).sum(dim=1)
    siblings = scores.groups[:, None] == scores.groups[None, :]  # [N, N]
    siblings &= scores.usable[None, :]
    balance = torch.sign(combined[:, None] - combined[None, :]) * siblings
    return combined, balance.sum(dim=1) / (siblings.sum(dim=1) - 1).clamp(min=1)

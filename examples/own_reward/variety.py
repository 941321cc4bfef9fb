"""A reward that compares the images of a prompt: it wants them to differ."""

from collections.abc import Sequence

import numpy as np

from rewards import Missing, RewardRequest


class Variety:
    """How far the mean colour of an image is from those of its prompt's other images, 0..1."""

    def score_groups(self, groups: Sequence[Sequence[RewardRequest]]) -> list[list[float | Missing]]:
        """One list of scores per group, in order; a group is all images of one prompt."""
        return [self._distances([request.image.mean((0, 1)) / 255 for request in group]) for group in groups]

    def _distances(self, colours: list[np.ndarray]) -> list[float | Missing]:
        if len(colours) == 1:
            return [Missing("refused", "there is no other image of this prompt")]
        return [float(sum(np.abs(one - other).mean() for other in colours)) / (len(colours) - 1) for one in colours]

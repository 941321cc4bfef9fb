"""The source pictures of edits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.base import RewardRequest


def is_edit(request: RewardRequest) -> bool:
    """Whether the request has a source."""
    return bool(request.references)


def distinct_sources(requests: Sequence[RewardRequest]) -> tuple[list[np.ndarray], list[int]]:
    """Each first source once, as all samples of a prompt have the same, and the place of every request's among them."""
    places: dict[tuple[tuple[int, ...], bytes], int] = {}
    sources: list[np.ndarray] = []
    rows: list[int] = []
    for request in requests:
        source = request.references[0]
        place = places.setdefault((source.shape, source.tobytes()), len(places))
        if place == len(sources):
            sources.append(source)
        rows.append(place)
    return sources, rows

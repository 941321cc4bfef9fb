"""A custom reward: how close an image is to a wanted brightness."""

from collections.abc import Sequence

from rewards import PoolSettings, RewardRequest, setting


class Brightness:
    """How close the mean brightness of an image is to the wanted one, 0..1."""

    class Options(PoolSettings):
        wanted: float = setting(0.5, "Wanted mean brightness: 0 is black, 1 white.", ge=0, le=1)

    def __init__(self, options: Options) -> None:
        self.wanted = options.wanted

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        """One score per request, in order; higher is better; None = missing (never 0 instead)."""
        return [1 - abs(float(request.image.mean()) / 255 - self.wanted) for request in requests]

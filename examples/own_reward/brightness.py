"""A reward of one's own: how close an image comes to a wanted brightness."""

from collections.abc import Sequence

from rewards import PoolSettings, RewardRequest, setting


class Brightness:
    """How close the mean brightness of an image is to the wanted one, 0..1."""

    class Options(PoolSettings):
        wanted: float = setting(0.5, "Wanted mean brightness: 0 is black, 1 white.", ge=0, le=1)

    def __init__(self, options: Options) -> None:
        self.wanted = options.wanted

    def score(self, requests: Sequence[RewardRequest]) -> list[float | None]:
        """One score a request, in order; the higher the better; None = could not be had (never 0 instead)."""
        return [1 - abs(float(request.image.mean()) / 255 - self.wanted) for request in requests]

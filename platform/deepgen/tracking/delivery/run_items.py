"""What is sent to MLflow about a run: each item is one delivery (`deepgen.tracking.delivery.sender`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from deepgen.tracking.delivery.sender import MAX_BATCH, Item

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_MAX_PER_REQUEST = 100  # parameters, or tags
_Client = Callable[[], "MlflowClient"]


class Single:
    """An item that goes alone."""

    def merge(self, other: Any) -> bool:
        return False


@dataclass
class MetricsItem:
    client: _Client
    run_id: str
    metrics: list[Metric]

    def send(self) -> None:
        # MLflow drops exact repetitions, so sending again after a lost answer is safe.
        self.client().log_batch(self.run_id, metrics=self.metrics, synchronous=True)

    def merge(self, other: Any) -> bool:
        if not isinstance(other, MetricsItem) or len(self.metrics) + len(other.metrics) > MAX_BATCH:
            return False
        self.metrics += other.metrics
        return True


@dataclass
class ImageItem(Single):
    client: _Client
    run_id: str
    key: str
    step: int
    timestamp: int
    path: Path
    image: Image.Image | None  # None once saved to `path`: a long outage must not fill the memory

    def send(self) -> None:
        if self.image is not None:
            self.image.save(self.path)
            self.image = None
        with Image.open(self.path, formats=("PNG",)) as image:
            self.client().log_image(
                self.run_id, image, key=self.key, step=self.step, timestamp=self.timestamp, synchronous=True
            )


@dataclass
class FileItem(Single):
    client: _Client
    run_id: str
    path: Path

    def send(self) -> None:
        self.client().log_artifact(self.run_id, str(self.path))


@dataclass
class TagItem(Single):
    client: _Client
    run_id: str
    key: str
    value: str

    def send(self) -> None:
        self.client().set_tag(self.run_id, self.key, self.value)


@dataclass
class AboutItem(Single):
    client: _Client
    run_id: str
    tags: dict[str, str]
    params: dict[str, str]

    def send(self) -> None:
        from mlflow.entities import Param, RunTag

        tags, params = [RunTag(*pair) for pair in self.tags.items()], [Param(*pair) for pair in self.params.items()]
        for start in range(0, max(len(tags), len(params)), _MAX_PER_REQUEST):
            part = slice(start, start + _MAX_PER_REQUEST)
            self.client().log_batch(self.run_id, tags=tags[part], params=params[part])


@dataclass
class ExperimentTagItem(Single):
    client: _Client
    experiment_id: str
    key: str
    value: str

    def send(self) -> None:
        self.client().set_experiment_tag(self.experiment_id, self.key, self.value)


@dataclass
class EndItem(Single):
    client: _Client
    run_id: str
    status: str

    def send(self) -> None:
        self.client().set_terminated(self.run_id, status=self.status)


@dataclass
class LaterItem(Single):
    """What can only be known once the server answers: `find` asks it, and says what to send then."""

    find: Callable[[], Sequence[Item]]
    found: list[Item] | None = field(default=None)

    def send(self) -> None:
        if self.found is None:
            self.found = list(self.find())
        while self.found:  # what has arrived is not sent again
            self.found[0].send()
            del self.found[0]

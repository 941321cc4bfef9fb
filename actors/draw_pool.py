"""Draws outside of training, for `stages/generate.py`: processes of Ray Data, each with the model."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepgen.data.records import Record
from deepgen.drawing.request import DrawRequest
from deepgen.errors import UserError

START_S = 900.0  # for a process: autoscaled nodes, imports, and weights from a shared disk


@dataclass(frozen=True)
class Model:
    """What a process loads. batch: pictures in one forward."""

    weights: Path
    padding: str
    precision: str
    batch: int


def draw_all(jobs: Sequence[DrawRequest], model: Model, *, gpus: bool) -> Iterator[tuple[Record, int, np.ndarray]]:
    """The pictures of the jobs as they are drawn, with record and number of the sample.

    Every GPU of the cluster gets a process; without GPUs, as many processes share the CPUs as memory and jobs allow.

    Raises UserError if the weights do not fit the model or the batch does not fit the memory.
    """
    if not jobs:
        return
    import ray.data
    from ray.exceptions import GetTimeoutError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the program's own bar counts pictures
    context.wait_for_min_actors_s = int(START_S)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plans, and that its bars are off
    items = [{"job": number, "request": pickle.dumps(job)} for number, job in enumerate(jobs)]
    compute, share = _shares(len(jobs), model.weights, gpus=gpus)
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        DrawWorker, fn_constructor_args=[model], compute=compute, **share
    )
    try:
        for row in rows.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield from _pictures(row, jobs[row["job"]])
    except GetTimeoutError as error:
        raise UserError(
            f"cluster.address: no process for drawing has started within {START_S:.0f} s, each of which needs {share}; "
            "are all of them taken? `ray status` says who has them"
        ) from error


def _shares(jobs: int, weights: Path, *, gpus: bool) -> tuple[Any, dict[str, float]]:
    """How many processes draw, and what of a node each of them has."""
    import ray
    from ray.data import ActorPoolStrategy

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus:
        now = int(sum(node.get("GPU", 0) for node in nodes))
        pool = ActorPoolStrategy(min_size=1, initial_size=max(1, min(jobs, now)), max_size=jobs)
        return pool, {"num_gpus": 1, "num_cpus": 1}
    size = 2 * sum(file.stat().st_size for file in weights.rglob("*.safetensors"))  # bf16 files are fp32 in memory
    fit = sum(max(1, min(int(node.get("CPU", 1)), int(node.get("memory", 0) // max(1, size)))) for node in nodes)
    count = min(jobs, fit)
    threads = max(1, int(max(node.get("CPU", 1) for node in nodes)) * len(nodes) // count)
    return ActorPoolStrategy(size=count), {"num_cpus": min(threads, max(node.get("CPU", 1) for node in nodes))}


def _pictures(row: Mapping[str, Any], job: DrawRequest) -> Iterator[tuple[Record, int, np.ndarray]]:
    pixels = np.frombuffer(row["pixels"], dtype=np.uint8)
    for record, shape, start in zip(job.records, row["shapes"], row["starts"], strict=True):
        own = pixels[start : start + int(np.prod(shape))].reshape(shape)
        yield from ((record, sample, picture) for sample, picture in zip(job.samples, own, strict=True))


class DrawWorker:
    """A process with the model. An error of the user's is returned as data: Ray would bury it in tracebacks."""

    def __init__(self, model: Model) -> None:
        import torch

        from deepgen.drawing.painter import Painter
        from deepgen.models.unified import UnifiedModel

        self._batch, self._error = model.batch, ""
        try:
            unified = UnifiedModel.from_folder(model.weights, padding=model.padding)
        except UserError as error:
            self._error = str(error)
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        unified = unified.to(device).eval().requires_grad_(False)
        self._painter = Painter(unified, bf16=model.precision == "bf16", batch=model.batch)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        pictures = [] if self._error else self._draw(pickle.loads(row["request"]))
        return {
            "job": row["job"],
            "error": self._error,
            "pixels": b"".join(one.tobytes() for one in pictures),
            "shapes": [list(one.shape) for one in pictures],
            "starts": np.cumsum([0, *(one.size for one in pictures)])[:-1].tolist(),
        }

    def _draw(self, request: DrawRequest) -> list[np.ndarray]:
        import torch

        try:
            return self._painter.draw(request)
        except torch.OutOfMemoryError as error:
            self._error = (
                f"--batch: {self._batch} pictures do not fit into the GPU's memory ({error}); give a smaller one"
            )
            return []

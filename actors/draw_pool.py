"""Draws outside of training, for `stages/generate.py`: processes that each have the model and take jobs as they can.

A process that dies is replaced, and what it drew is drawn again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepgen.cluster.capacity import cluster_nodes
from deepgen.data.records import Record
from deepgen.drawing.request import DrawRequest
from deepgen.errors import UserError
from deepgen.monitoring.log_lines import Speaker, set_up_logs

START_S = 900.0  # until a first process is there: autoscaled nodes, imports, weights from a shared disk
DRAW_S = 3600.0  # for one forward after another, until any process has a job done
ATTEMPTS = 3  # deaths of processes with the same job, or of all while they start


@dataclass(frozen=True)
class Model:
    """What a process loads. batch: pictures in one forward."""

    weights: Path
    padding: str
    precision: str
    batch: int


def draw_all(jobs: Sequence[DrawRequest], model: Model, *, gpus: bool) -> Iterator[tuple[Record, int, np.ndarray]]:
    """The pictures of the jobs as they are drawn, uint8 [H, W, 3], with record and number of the sample.

    Every GPU that the cluster has or may start gets a process; without GPUs, as many processes share the CPUs as memory
    and jobs allow.

    Raises UserError if the weights do not fit the model, if a batch does not fit the memory, or if no process starts or
    draws for long; RuntimeError if processes keep dying.
    """
    for number, pictures in _Pool(jobs, model, gpus=gpus).results():
        for record, own in zip(jobs[number].records, pictures, strict=True):
            yield from ((record, sample, picture) for sample, picture in zip(jobs[number].samples, own, strict=True))


class _Pool:
    """Processes, and what each of them is doing: starting, or drawing a job."""

    def __init__(self, jobs: Sequence[DrawRequest], model: Model, *, gpus: bool) -> None:
        self._jobs, self._model = jobs, model
        self._todo = deque(range(len(jobs)))
        self._deaths: Counter[int | None] = Counter()
        # Reference of what is waited for -> process, and its job's number; None while it starts.
        self._doing: dict[Any, tuple[Any, int | None]] = {}
        self._started = False
        count, self._share = _shares(len(jobs), model.weights, gpus=gpus)
        for _ in range(count):
            self._start()

    def results(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Numbers of jobs and their pictures, uint8 [samples, H, W, 3] for each prompt, as they are done."""
        import ray

        from actors.gone import GONE

        left = len(self._jobs)
        while left:
            reference = self._wait()
            process, done = self._doing.pop(reference)
            try:
                pictures = ray.get(reference)
            except GONE as error:
                self._replace(done, error)
                continue
            self._started = True
            if self._todo:
                job = self._todo.popleft()
                self._doing[process.draw.remote(self._jobs[job])] = process, job
            if done is not None:
                left -= 1
                yield done, pictures

    def _wait(self) -> Any:
        import ray

        limit = DRAW_S if self._started else START_S
        done, _ = ray.wait(list(self._doing), timeout=limit)
        if done:
            return done[0]
        what = "drawn a batch" if self._started else f"started with {self._share}; `ray status` says what is taken"
        raise UserError(f"--address: in {limit:.0f} s no process for drawing has {what}")

    def _start(self) -> None:
        import ray

        process = ray.remote(DrawWorker).options(**self._share).remote(self._model)
        self._doing[process.load.remote()] = process, None

    def _replace(self, job: int | None, error: Exception) -> None:
        """Start a process in the place of one that has died. Its job is drawn next."""
        self._deaths[job] += 1
        if self._deaths[job] >= ATTEMPTS + len(self._doing) * (job is None):
            what = "while they load the model" if job is None else f"on {[r.id for r in self._jobs[job].records]}"
            raise RuntimeError(f"{self._deaths[job]} processes for drawing have died {what}: {error}") from error
        if job is not None:
            self._todo.appendleft(job)
        self._start()


def _shares(jobs: int, weights: Path, *, gpus: bool) -> tuple[int, dict[str, float]]:
    """How many processes draw, and what of a node each of them has."""
    nodes = [node.resources for node in cluster_nodes()]
    if gpus:
        return min(jobs, int(sum(node.get("GPU", 0) for node in nodes))), {"num_gpus": 1, "num_cpus": 1}
    size = 2 * sum(file.stat().st_size for file in weights.rglob("*.safetensors"))  # bf16 files are fp32 in memory
    cores = [max(1, int(node.get("CPU", 1))) for node in nodes]
    fit = [int(node.get("memory", 0) // max(1, size)) for node in nodes]
    count = min(jobs, sum(max(1, min(both)) for both in zip(cores, fit, strict=True)))
    return count, {"num_cpus": max(1, min(max(cores), sum(cores) // count))} if count else {}


class DrawWorker:
    """A process with the model, on the GPU that Ray gives it, or on CPUs."""

    def __init__(self, model: Model) -> None:
        set_up_logs(Speaker("draw"))
        self._model = model

    def load(self) -> None:
        """Load the model. Not when the process is made: there an error of the user's would be the process's death."""
        import torch

        from deepgen.drawing.painter import Painter
        from deepgen.models.unified import UnifiedModel

        model = UnifiedModel.from_folder(self._model.weights, padding=self._model.padding)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
        self._painter = Painter(model, bf16=self._model.precision == "bf16", batch=self._model.batch)

    def draw(self, request: DrawRequest) -> list[np.ndarray]:
        """As `Painter.draw`. Raises UserError if a batch does not fit the GPU's memory."""
        import torch

        try:
            return self._painter.draw(request)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--batch: {self._model.batch} pictures do not fit into the GPU's memory ({error})"
            ) from error

"""Draws outside of training: one process of Ray Data with a model, for `stages/generate.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepgen.drawing.request import DrawRequest
from deepgen.errors import UserError


class DrawWorker:
    """Draws jobs by their numbers. An error of the user's is returned as data: Ray would bury it in tracebacks."""

    def __init__(self, jobs: Sequence[DrawRequest], weights: Path, painter: Mapping[str, str], batch: int) -> None:
        import torch

        from deepgen.drawing.painter import Painter
        from deepgen.models.unified import UnifiedModel

        self._jobs, self._error = jobs, ""
        try:
            model = UnifiedModel.from_folder(weights, padding=painter["padding"])
        except UserError as error:
            self._error = str(error)
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = model.to(device).eval().requires_grad_(False)
        self._painter = Painter(model, bf16=painter["precision"] == "bf16", batch=batch)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job = self._jobs[row["job"]]
        pictures: list[np.ndarray] = [] if self._error else self._painter.draw(job)
        return {
            "job": row["job"],
            "error": self._error,
            "pixels": b"".join(one.tobytes() for one in pictures),
            "shapes": [list(one.shape) for one in pictures],
            "starts": np.cumsum([0, *(one.size for one in pictures)])[:-1].tolist(),
        }

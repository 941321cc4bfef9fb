"""Held-out prompts: which are drawn, and what came out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deepgen.config import Settings
from deepgen.config.settings import TASKS
from deepgen.data.records import Record, decode_image
from deepgen.data.usable import usable_records
from deepgen.tracking.grids import GridRow, image_grid

GRID_PROMPTS = 8  # of the grids during training
ROW_PROMPTS = 16  # of the before/after grid


@dataclass(frozen=True)
class Evaluation:
    """N prompts with S samples each, drawn without noise on the way from fixed seeds, and scored by K rewards."""

    records: tuple[Record, ...]  # N
    images: tuple[np.ndarray, ...]  # N times uint8 [S, H, W, 3]
    names: tuple[str, ...]  # K
    scores: np.ndarray  # float32 [N, S, K], NaN where not asked or not to be had
    weights: np.ndarray  # float32 [N, K], 0 = not asked
    version: int  # of the policy

    def columns(self) -> dict[str, np.ndarray]:
        """Scores by reward, [N * S] each, the samples of a prompt side by side; only rewards that were asked for."""
        return {self.names[k]: self.scores[:, :, k].reshape(-1) for k in self._asked()}

    def sample_weights(self) -> np.ndarray:
        """Weights as `columns` are ordered, [N * S, rewards]."""
        return np.repeat(self.weights[:, self._asked()], self.scores.shape[1], axis=0)

    def sample_ids(self) -> list[str]:
        """Prompt of each row of `columns`."""
        return [record.id for record in self.records for _ in range(self.scores.shape[1])]

    def means(self) -> dict[str, float]:
        """Mean of each reward over the scores that exist, and of the weighted total; absent where there are none."""
        columns = self.columns()
        means = {name: float(np.nanmean(column)) for name, column in columns.items() if np.isfinite(column).any()}
        total = weighted_total(np.stack(list(columns.values()), axis=1), self.sample_weights())
        if np.isfinite(total).any():
            means["total"] = float(np.nanmean(total))
        return means

    def _asked(self) -> list[int]:
        return np.flatnonzero((self.weights > 0).any(axis=0)).tolist()

    def prompt_scores(self, i: int) -> dict[str, float]:
        """Mean of each reward that was asked for prompt i; NaN where none could be had."""
        asked = [k for k in range(len(self.names)) if self.weights[i, k] > 0]
        return {self.names[k]: _mean(self.scores[i, :, k]) for k in asked}

    def save(self, path: Path) -> None:
        """Write everything but the prompts, whose ids stay to check them by."""
        path.parent.mkdir(parents=True, exist_ok=True)
        images = {f"image/{i}": image for i, image in enumerate(self.images)}
        partial = path.with_name(path.name + ".partial.npz")
        np.savez_compressed(
            partial,
            ids=np.array([record.id for record in self.records]),
            names=np.array(self.names),
            scores=self.scores,
            weights=self.weights,
            version=self.version,
            **images,  # type: ignore[arg-type]
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, records: Sequence[Record]) -> Evaluation | None:
        """What `save` wrote, or None when it was of other prompts."""
        with np.load(path, allow_pickle=False) as saved:
            if saved["ids"].tolist() != [record.id for record in records]:
                return None
            images = tuple(saved[f"image/{i}"] for i in range(len(records)))
            names = tuple(str(name) for name in saved["names"])
            return cls(tuple(records), images, names, saved["scores"], saved["weights"], int(saved["version"]))


def weighted_total(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean [N] of the scores [N, K] that exist; NaN where there is none."""
    used = np.where(np.isfinite(scores), weights, 0.0)
    total = used.sum(axis=1)
    weighted = (np.nan_to_num(scores) * used).sum(axis=1)
    return np.divide(weighted, total, out=np.full(len(total), np.nan), where=total > 0)


def heldout_records(settings: Settings, *, say: Callable[[str], None] = print) -> list[Record]:
    """The held-out prompts of a run, at most evaluation.prompts, as many of each task as there are; [] for none.

    The choice depends on the file and evaluation.seed only, so runs that are compared draw the same prompts. One that
    cannot be used is left out, see `usable_records`.
    """
    count, seed = settings.evaluation.prompts, settings.evaluation.seed
    if not count:
        return []
    found = usable_records(settings, "data.heldout", lambda records: choose_records(records, count, seed), say)
    return [record for _, record in found]


def choose_records(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """At most `count` records, taking the tasks in turn, in the order of `records`."""
    rng = random.Random(seed)
    by_task = [[i for i, record in enumerate(records) if record.task == task] for task in TASKS]
    for numbers in by_task:
        rng.shuffle(numbers)
    longest = max(map(len, by_task))
    in_turn = [numbers[place] for place in range(longest) for numbers in by_task if place < len(numbers)]
    return [records[i] for i in sorted(in_turn[:count])]


def grid(evaluation: Evaluation, title: str) -> Image.Image:
    """First sample of each prompt with caption, scores and the source of an edit."""
    records = evaluation.records
    return image_grid(
        [images[0] for images in evaluation.images],
        [record.prompt for record in records],
        [evaluation.prompt_scores(i) for i in range(len(records))],
        columns=4,
        title=title,
        sources=[decode_image(record.references[0]) if record.references else None for record in records],
    )


def grid_rows(before: Evaluation, after: Evaluation, prompts: int = ROW_PROMPTS) -> list[GridRow]:
    """Rows of the before/after grid: the same prompts, the tasks in turn."""
    chosen = {record.id for record in choose_records(before.records, prompts, seed=0)}
    return [
        GridRow(
            prompt=record.prompt,
            before=list(before.images[i][:2]),
            after=list(after.images[i][:2]),
            before_scores=before.prompt_scores(i),
            after_scores=after.prompt_scores(i),
            references=[decode_image(data) for data in record.references],
            task=record.task,
        )
        for i, record in enumerate(before.records)
        if record.id in chosen
    ]


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")

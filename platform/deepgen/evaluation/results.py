"""The result of an evaluation: images and scores of the held-out prompts."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from deepgen.data.records import Record

BEFORE, AFTER = "evaluation-before.npz", "evaluation-after.npz"  # files of a run: of its first and last weights


@dataclass(frozen=True)
class Evaluation:
    """N prompts with S samples each, drawn by the ODE from fixed seeds and scored by K rewards."""

    records: tuple[Record, ...]  # N
    images: tuple[np.ndarray, ...]  # N times uint8 [S, H, W, 3]
    names: tuple[str, ...]  # K
    scores: np.ndarray  # float32 [N, S, K], NaN where missing or not asked for
    reward_weights: np.ndarray  # float32 [N, K], 0 = not trained on
    version: int  # policy version that drew the images
    held_out_weights: np.ndarray | None = None  # float32 [N, K] of rewards that are only watched; None: there are none

    def columns(self) -> dict[str, np.ndarray]:
        """Scores by reward, [N * S] each, the samples of a prompt side by side. Only rewards that were asked for."""
        return {self.names[k]: self.scores[:, :, k].reshape(-1) for k in self._asked()}

    def sample_weights(self) -> np.ndarray:
        """Reward weights [N * S, rewards], in the order of `columns`; 0 for a reward that is held out."""
        return np.repeat(self.reward_weights[:, self._asked()], self.scores.shape[1], axis=0)

    def sample_ids(self) -> list[str]:
        """Prompt of each row of `columns`."""
        return [record.id for record in self.records for _ in range(self.scores.shape[1])]

    def means(self) -> dict[str, float]:
        """Mean of each trained reward and of the weighted total over the scores that exist; absent without any."""
        return self._means(self.reward_weights)

    def held_out_means(self) -> dict[str, float]:
        """As `means`, of the rewards that are held out."""
        return {} if self.held_out_weights is None else self._means(self.held_out_weights)

    def _means(self, weights: np.ndarray) -> dict[str, float]:
        own = np.flatnonzero((weights > 0).any(axis=0)).tolist()
        columns = {self.names[k]: self.scores[:, :, k].reshape(-1) for k in own}
        means = {name: float(np.nanmean(column)) for name, column in columns.items() if np.isfinite(column).any()}
        samples = self.scores.shape[1]
        total = weighted_total(self.scores.reshape(-1, len(self.names)), np.repeat(weights, samples, axis=0))
        if np.isfinite(total).any():
            means["total"] = float(np.nanmean(total))
        return means

    def _asked(self) -> list[int]:
        weights = self.reward_weights if self.held_out_weights is None else self.reward_weights + self.held_out_weights
        return np.flatnonzero((weights > 0).any(axis=0)).tolist()

    def prompt_scores(self, i: int) -> dict[str, float]:
        """Mean of each reward that was asked for prompt i; NaN where all scores are missing."""
        asked = [k for k in range(len(self.names)) if self.reward_weights[i, k] > 0]
        return {self.names[k]: _mean(self.scores[i, :, k]) for k in asked}

    def save(self, path: Path) -> None:
        """Write everything except the prompts. Their ids are saved, so that `load` can check them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        images = {f"image/{i}": image for i, image in enumerate(self.images)}
        held_out = {} if self.held_out_weights is None else {"held_out": self.held_out_weights}
        partial = path.with_name(path.name + ".partial.npz")
        np.savez_compressed(
            partial,
            ids=np.array([record.id for record in self.records]),
            names=np.array(self.names),
            scores=self.scores,
            weights=self.reward_weights,
            version=self.version,
            **held_out,  # type: ignore[arg-type]
            **images,  # type: ignore[arg-type]
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, records: Sequence[Record], *, pictures: bool = True) -> Evaluation | None:
        """Read what `save` wrote, or None if it belongs to other prompts or is damaged. pictures: with its images."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                if saved["ids"].tolist() != [record.id for record in records]:
                    return None
                images = tuple(saved[f"image/{i}"] for i in range(len(records) if pictures else 0))
                names = tuple(str(name) for name in saved["names"])
                held_out = saved.get("held_out")
                version = int(saved["version"])
                return cls(tuple(records), images, names, saved["scores"], saved["weights"], version, held_out)
        except (BadZipFile, zlib.error, ValueError, EOFError, KeyError):
            return None


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """What is logged of an evaluation, names as in `deepgen.tracking`."""
    means = {f"eval/{name}": mean for name, mean in evaluation.means().items()}
    return means | {f"eval_held_out/{name}": mean for name, mean in evaluation.held_out_means().items()}


def weighted_total(scores: np.ndarray, reward_weights: np.ndarray) -> np.ndarray:
    """Weighted mean [N] of the scores [N, K] that exist, by reward_weights [N, K]; NaN for a row without scores."""
    used = np.where(np.isfinite(scores), reward_weights, 0.0)
    total = used.sum(axis=1)
    weighted = (np.nan_to_num(scores) * used).sum(axis=1)
    return np.divide(weighted, total, out=np.full(len(total), np.nan), where=total > 0)


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")

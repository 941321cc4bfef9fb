"""Flow matching: its targets and its dropped captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.learner.protocols import StepContext
from actors.objectives.flow_matching import FlowMatching
from actors.objectives.record_source import MixtureSource
from deepgen.algorithms.losses import flow_matching_loss
from deepgen.config import load_settings
from deepgen.data.cache.encoded import EncodingCache, MemoryStore
from deepgen.data.loading.dataset import LATENT, TrainingSet
from deepgen.data.loading.mixture import Mixture
from deepgen.data.loading.parquet_store import ListStore
from deepgen.data.quarantine import Quarantine
from tests.helpers.sft_world import make_records


def test_flow_matching_targets_and_dropped_captions(tmp_path: Path) -> None:
    settings = load_settings(None, ["data.micro_batch=8", "data.image_size=64", "data.caption_drop=0.5"])
    data = TrainingSet(ListStore(make_records()), 64)
    cache = EncodingCache({LATENT: lambda image: image[:, ::4, ::4]}, MemoryStore())
    objective = FlowMatching(settings, cache, Quarantine(0.0, tmp_path))
    source = MixtureSource(data, Mixture.from_settings(settings, data.store, 8), objective.cache, objective.quarantine)
    context = StepContext(1, 0, 0, 1, torch.device("cpu"))
    asked: list[tuple[list[str], Any]] = []

    class Perfect:
        """Returns the true velocity of its micro-batch."""

        def encode_prompts(self, prompts: list[str], references: Any) -> None:
            asked.append((prompts, references))

        def cut_prompts(self, prompts: list[str]) -> int:
            return len(prompts)

        def velocity(self, latents: list[Tensor], times: Tensor, conditioning: Any, references: Any) -> list[Tensor]:
            sigma = (times / 1000).view(-1, 1, 1, 1)
            noisy = torch.stack(micro.latents) * (1 - sigma) + torch.stack(micro.noise) * sigma
            torch.testing.assert_close(torch.stack(latents), noisy)
            return [n - x for n, x in zip(micro.noise, micro.latents, strict=True)]

    model: Any = Perfect()
    micros = objective.prepare(model, source.next(0, 0, 1), context)
    assert [micro.task for micro in micros] == ["edit", "t2i", "t2i"]
    for micro in micros:
        loss, metrics = objective.loss(model, micro, context)
        assert float(loss) == pytest.approx(0, abs=1e-10)
        assert metrics["images_sum"] == metrics["data/cut_prompts_sum"] == 8
        assert f"loss/flow_matching_{micro.task}" in metrics
        assert micro.share == pytest.approx(1 / 3)
    assert "" not in asked[0][0] and asked[0][1] is not None
    dropped = [prompt == "" for prompts, _ in asked[1:] for prompt in prompts]
    assert 2 <= sum(dropped) <= 14 and asked[1][1] is None
    again = objective.prepare(model, source.next(0, 0, 1), context)
    assert torch.equal(torch.stack(again[1].noise), torch.stack(micros[1].noise))
    assert again[1].prompts == micros[1].prompts
    assert flow_matching_loss(micros[0].latents, micros[0].latents, micros[0].noise).loss > 0.5

"""How held-out records are split among ranks, and which of them count."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from actors.learner.protocols import StepContext
from actors.objectives.flow_matching import FlowMatching
from actors.objectives.heldout_loss import Heldout, Pictures, share_out
from deepgen.config import load_settings
from deepgen.data.cache.encoded import EncodingCache, MemoryStore
from deepgen.data.loading.dataset import LATENT
from deepgen.data.records import Record
from tests.helpers.factories import make_tiny_model


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def records(generation: int, edits: int) -> list[Record]:
    tasks = ("t2i", "text")
    drawn = [Record(f"g{i}", tasks[i % 2], f"prompt {i}", "", picture(i), (), "") for i in range(generation)]
    edited = [Record(f"e{i}", "edit", "mirror it", "", picture(i), (picture(99 + i),), "") for i in range(edits)]
    return drawn + edited


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_share_the_records_and_do_the_same_kinds_in_step(world: int) -> None:
    shares = [share_out(records(7, 3), 2, rank, world) for rank in range(world)]
    assert len({tuple(kind for kind, _ in share) for share in shares}) == 1
    found = [timed.record.id for share in shares for _, chunk in share for timed in chunk]
    assert sorted(found) == sorted(record.id for record in records(7, 3))
    times = sorted(t.time for share in shares for kind, chunk in share for t in chunk if kind == "edit")
    assert times == pytest.approx([1 / 6, 3 / 6, 5 / 6])


class Model:
    """A model with velocity 0, so the error of a sample is the mean square of noise - x0."""

    def encode_prompts(self, prompts: list[str], references: Any) -> None: ...

    def velocity(self, latents: list[Tensor], *_: Any) -> list[Tensor]:
        return [torch.zeros_like(x) for x in latents]


def test_records_without_usable_target_take_no_part_and_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(None, ["data.micro_batch=2", "data.image_size=64", "evaluation.seed=3"])
    cache = EncodingCache({LATENT: lambda image: image[:, ::4, ::4]}, MemoryStore())
    objective: Any = FlowMatching(settings, cache, SimpleNamespace())  # type: ignore[arg-type]
    context: Any = SimpleNamespace(settings=settings, rank=0, world=1, tracker=None, say=lambda line: None)
    model: Any = Model()
    here = StepContext(1, 5, 0, 1, torch.device("cpu"))

    def measure(held: list[Record], suffix: str = "") -> dict[str, float]:
        monkeypatch.setattr("actors.objectives.heldout_loss.heldout_records", lambda *_, **__: held)
        evaluate = Heldout(context, objective).evaluation(0)
        return evaluate(model, here, suffix) if evaluate else {}

    good = records(4, 2)
    expected = measure(good)
    assert expected.keys() == {f"heldout_loss/{name}" for name in ("t2i", "text", "edit", "all", "records")}
    assert expected["heldout_loss/records"] == 6
    assert measure(good, "_ema")["heldout_loss_ema/all"] == expected["heldout_loss/all"]
    bad = [replace(good[0], id="none", image=None), replace(good[1], id="cut", image=good[1].image[:200])]  # type: ignore[index]
    assert measure([*good, *bad]) == pytest.approx(expected)  # each record has its own noise
    assert measure(bad) == {}


def test_pictures_have_the_guidance_of_evaluations() -> None:
    """The guidance and the negative prompt of evaluations decide, not the guidance of rollouts."""
    model = make_tiny_model()

    def drawn(*overrides: str) -> np.ndarray:
        common = ["data.image_size=64", "evaluation.num_steps=2", "model.precision=fp32"]
        grids: list[np.ndarray] = []
        tracker = SimpleNamespace(log_images=lambda name, step, image: grids.append(np.asarray(image).astype(int)))
        settings = load_settings(None, [*common, *overrides])
        context: Any = SimpleNamespace(settings=settings, tracker=tracker, model=model)
        Pictures(context, records(1, 1)).draw(0, "")
        return grids[0]

    off = drawn("evaluation.guidance_scale=1")
    assert np.array_equal(off, drawn("evaluation.guidance_scale=1", "rollout.guidance_scale=4"))
    guided = drawn("evaluation.guidance_scale=4")
    assert np.array_equal(guided, drawn())
    assert not np.array_equal(off, guided)
    assert not np.array_equal(guided, drawn("evaluation.negative_prompt=blurry"))

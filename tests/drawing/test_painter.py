"""What a picture depends on: its prompt, the seed and the settings, and nothing else."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deepgen.data.records import Record
from deepgen.drawing.painter import Painter
from deepgen.drawing.request import DrawRequest
from deepgen.models.unified import UnifiedModel
from tests.helpers.factories import make_tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> UnifiedModel:
    return UnifiedModel.from_folder(make_tiny_folder(tmp_path_factory.mktemp("model"))).requires_grad_(False)


def source(level: int, size: tuple[int, int] = (64, 64)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (level, 255 - level, 90)).save(stream, "PNG")
    return stream.getvalue()


RECORDS = (
    Record("a", "t2i", "a red cat", "a red cat", None, (), ""),
    Record("b", "t2i", "two small blue boats on a lake", "boats", None, (), ""),
    Record("c", "edit", "make it green", "green", None, (source(40),), ""),
    Record("d", "edit", "put both together", "both", None, (source(40), source(200, (96, 48))), ""),
    Record("e", "text", 'a sign that says "OPEN"', "a sign", None, (), ""),
)
REQUEST = DrawRequest(RECORDS, (0, 1, 2), seed=7, image_size=64, num_steps=3, shift=3.0)


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal up to a value on the edge of rounding: matrix kernels round differently at other batch sizes."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["ode", "cps"])
def test_neighbours_and_batches_change_nothing(model: UnifiedModel, sampler: str, guidance: float) -> None:
    request = replace(REQUEST, sampler=sampler, eta=1.0 if sampler == "cps" else 0.0, guidance_scale=guidance)
    together = Painter(model, bf16=False, batch=16).draw(request)
    by_two = Painter(model, bf16=False, batch=2).draw(replace(request, records=RECORDS[::-1]))[::-1]
    for i, record in enumerate(RECORDS):
        for j in request.samples:
            (alone,) = Painter(model, bf16=False).draw(replace(request, records=(record,), samples=(j,)))
            assert alike(alone[0], together[i][j]) and alike(by_two[i][j], together[i][j])
    assert not any(alike(own[0], own[1]) for own in together)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sampler", ["ode", "cps"])
def test_one_at_a_time_pictures_have_the_same_bits(model: UnifiedModel, sampler: str, bf16: bool) -> None:
    painter = Painter(model, bf16=bf16, batch=1)
    request = replace(REQUEST, sampler=sampler, eta=1.0 if sampler == "cps" else 0.0, guidance_scale=4.0)
    forwards = painter.draw(request)
    backwards = painter.draw(replace(request, records=RECORDS[::-1], samples=(2, 0, 1)))
    for own, other in zip(forwards, backwards[::-1], strict=True):
        assert np.array_equal(own[[2, 0, 1]], other)


@pytest.mark.parametrize("part", ["seed", "epoch", "num_steps", "shift", "guidance_scale", "negative_prompt", "eta"])
def test_each_setting_counts(model: UnifiedModel, part: str) -> None:
    base = replace(REQUEST, records=RECORDS[:1], samples=(0,), sampler="cps", eta=0.5, guidance_scale=3.0)
    values = {"negative_prompt": "a blue dog", "shift": 2.0, "eta": 0.9, "guidance_scale": 60.0}
    change: dict[str, Any] = {part: values.get(part, 8)}
    other = replace(base, **change)
    painter = Painter(model, bf16=False)
    assert not alike(painter.draw(base)[0][0], painter.draw(other)[0][0])


def test_sizes(model: UnifiedModel) -> None:
    """Of the first source, or a square, or as the request says: also of an edit."""
    painter = Painter(model, bf16=False)
    wide = Record("w", "edit", "make it green", "green", None, (source(9, (128, 64)),), "")
    request = replace(REQUEST, records=(RECORDS[0], wide), samples=(0,))
    assert [pictures.shape for pictures in painter.draw(request)] == [(1, 64, 64, 3), (1, 64, 96, 3)]
    given = painter.draw(replace(request, size=(48, 80)))
    assert [pictures.shape for pictures in given] == [(1, 48, 80, 3), (1, 48, 80, 3)]


def test_a_group_is_what_an_evaluation_draws(model: UnifiedModel) -> None:
    painter = Painter(model, bf16=False)
    for record in RECORDS[:3]:
        request = replace(REQUEST, records=(record,))
        pictures, samples = painter.draw_group(request)
        assert np.array_equal(pictures, painter.draw(request)[0])
        assert samples.trajectory.final.shape[0] == 3
    with pytest.raises(ValueError, match="one prompt"):
        painter.draw_group(REQUEST)

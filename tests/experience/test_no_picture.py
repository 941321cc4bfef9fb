"""A picture that is not finite is shown as such and never scored: as pixels, NaN would be black."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from actors.experience.reward_requests import make_requests, request_key
from deepgen.data.records import Record
from deepgen.drawing.pixels import is_picture, to_pixels


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_is_enough(value: float) -> None:
    drawn, failed = torch.zeros(2, 3, 24, 16)
    failed[1, 5, 7] = value
    images = [to_pixels(drawn), to_pixels(failed)]
    assert [image.shape for image in images] == [(24, 16, 3)] * 2
    assert images[0].min() == images[0].max() == 128
    assert sorted(np.unique(images[1].reshape(-1, 3), axis=0).tolist()) == [[0, 0, 0], [255, 0, 255]]
    record = Record("a", "t2i", "a cat", "", None, (), "test")
    first, second = map(request_key, make_requests(record, images))
    assert first and second is None


def test_what_is_drawn_is_a_picture() -> None:
    for colour in (0, 255):
        assert is_picture(np.full((8, 8, 3), colour, dtype=np.uint8))

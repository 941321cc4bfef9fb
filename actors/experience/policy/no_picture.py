"""What stands in the place of a picture that could not be drawn, because its latents or pixels are not finite.

As pixels, NaN would be black: a picture like any other, with scores of its own. This one looks like nothing that a
model draws, and no reward is asked about it (`request_key`). It is a picture, so that whatever keeps, shows or counts
pictures needs no other case.
"""

from __future__ import annotations

import numpy as np

_SQUARE = 8  # pixels
_COLOURS = np.array([[255, 0, 255], [0, 0, 0]], dtype=np.uint8)


def no_picture(height: int, width: int) -> np.ndarray:
    """A board of magenta and black squares, uint8 [height, width, 3]."""
    rows, columns = np.ogrid[:height, :width]
    return _COLOURS[(rows // _SQUARE + columns // _SQUARE) % 2]


def is_picture(image: np.ndarray) -> bool:
    """Whether an image, uint8 [H, W, 3], has been drawn."""
    height, width = image.shape[:2]
    begins_so = np.array_equal(image[:1], no_picture(1, width))  # tells nearly all of them apart
    return not (begins_so and np.array_equal(image, no_picture(height, width)))

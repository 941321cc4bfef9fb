"""From what the VAE decodes to pictures, and what stands in the place of one that could not be drawn.

As pixels, NaN would be black: a picture like any other, with scores of its own. `no_picture` looks like nothing that a
model draws, and no reward is asked about it. It is a picture, so that whatever keeps, shows or counts pictures needs no
other case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_SQUARE = 8  # pixels
_COLOURS = np.array([[255, 0, 255], [0, 0, 0]], dtype=np.uint8)


def to_pixels(image: Tensor) -> np.ndarray:
    """Convert [3, H, W] in [-1, 1] to uint8 [H, W, 3], rounding as the published scripts do (M1.7).

    `no_picture` if a number is not finite.
    """
    if not image.isfinite().all():
        return no_picture(*image.shape[1:])
    return (image.float() * 127.5 + 128).clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def no_picture(height: int, width: int) -> np.ndarray:
    """A board of magenta and black squares, uint8 [height, width, 3]."""
    rows, columns = np.ogrid[:height, :width]
    return _COLOURS[(rows // _SQUARE + columns // _SQUARE) % 2]


def is_picture(image: np.ndarray) -> bool:
    """Whether an image, uint8 [H, W, 3], has been drawn."""
    height, width = image.shape[:2]
    begins_so = np.array_equal(image[:1], no_picture(1, width))  # tells nearly all of them apart
    return not (begins_so and np.array_equal(image, no_picture(height, width)))

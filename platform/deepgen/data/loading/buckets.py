"""The size of an image in training, and the bucket of a record: records of one bucket have images of equal sizes.

The DiT pads all samples of a micro-batch to the longest one, so records of one bucket are drawn together
(``deepgen.data.loading.epoch_order``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SIDE_MULTIPLE = 32  # pixels; the latent stride, the DiT patch and the VLM's 28/32 resize all divide it
_MOST_SIDES = 1 << 16  # above the side of any image in units of SIDE_MULTIPLE


def fixed_area_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """(height, width) with about image_size^2 pixels, each side rounded up to a multiple of 32 (M1.9 fix_pixels).

    Bit for bit the reference's, in double precision: where the exact side is a multiple of 32, its rounding error may
    add 32, as for 2240 x 1260.
    """
    ratio = image_size / math.sqrt(height * width)
    return int(_sides(height, ratio)) * SIDE_MULTIPLE, int(_sides(width, ratio)) * SIDE_MULTIPLE


def bucket_numbers(sizes: Sequence[np.ndarray], image_size: int) -> np.ndarray:
    """Bucket of each of N records, [N] in the smallest unsigned integer type that fits.

    Two records share a bucket if each of their images has the same size in training. Unknown sizes count as equal.
    sizes: int [N, 2] (width, height) in pixels for the target, then for each reference; 0 if absent or unknown.
    """
    numbers = np.zeros(len(sizes[0]), dtype=np.int64)
    for size in sizes:
        width, height = size.astype(np.float64).T
        known = (width > 0) & (height > 0)
        ratio = np.zeros(len(size))
        ratio[known] = image_size / np.sqrt(width[known] * height[known])
        shape = np.where(known, _sides(height, ratio) * _MOST_SIDES + _sides(width, ratio), 0)
        shape = np.unique(shape, return_inverse=True)[1]
        numbers = np.unique(numbers * len(shape) + shape, return_inverse=True)[1]
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))


def _sides(pixels: int | np.ndarray, ratio: float | np.ndarray) -> np.ndarray:
    """The scaled side in units of SIDE_MULTIPLE, rounded up; int64. The order of operations is the reference's."""
    return np.ceil(np.asarray(pixels * ratio) / SIDE_MULTIPLE).astype(np.int64)

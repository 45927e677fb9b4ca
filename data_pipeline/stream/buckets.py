"""Aspect-ratio buckets: the few sizes that images of any shape are trained at, of about equal area."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

AREA_TOLERANCE = 0.1
"""Share by which a bucket's area may differ from the square's."""
NO_BUCKET = -1
_CHUNK = 1 << 16
"""Images assigned at a time: their work arrays stay in a core's cache."""


def bucket_sizes(resolution: int, *, multiple: int, max_aspect: float) -> tuple[tuple[int, int], ...]:
    """Sizes (height, width): the square, then pairs of a wide and a tall one, ever longer.

    Sides are multiples of ``multiple`` pixels (the patch), areas within 10% of ``resolution**2``, and the long
    side is at most ``max_aspect`` times the short one. There is one pair for each length of the short side.
    """
    if multiple < 1 or resolution < 1 or resolution % multiple:
        raise ValueError(f"resolution {resolution} is not a positive multiple of {multiple}")
    if not max_aspect >= 1 or math.isinf(max_aspect):
        raise ValueError(f"max_aspect must be finite and at least 1, got {max_aspect}")
    patches = resolution // multiple
    sizes = [(resolution, resolution)]
    for short in range(patches - 1, 0, -1):
        long = round(patches**2 / short)
        if long > max_aspect * short:
            break
        if abs(short * long / patches**2 - 1) <= AREA_TOLERANCE:
            sizes += [(short * multiple, long * multiple), (long * multiple, short * multiple)]
    return tuple(sizes)


def assign(
    height: "np.ndarray[Any, Any]", width: "np.ndarray[Any, Any]", sizes: Sequence[tuple[int, int]]
) -> "np.ndarray[Any, np.dtype[np.int16]]":
    """Bucket of each image: of those it covers, the nearest in log aspect ratio, the first of equals.

    -1 where it covers none. Takes 2 bytes an image beyond its arguments.
    """
    if len(height) != len(width):
        raise ValueError(f"{len(height)} heights and {len(width)} widths")
    if len(sizes) > np.iinfo(np.int16).max:
        raise ValueError(f"{len(sizes)} buckets")
    buckets = np.full(len(height), NO_BUCKET, dtype=np.int16)
    for start in range(0, len(height), _CHUNK):
        high, wide = height[start : start + _CHUNK], width[start : start + _CHUNK]
        # A side of 0 covers nothing; its logarithm need only be a number.
        aspect = np.log(np.maximum(wide, 1), dtype=np.float64) - np.log(np.maximum(high, 1), dtype=np.float64)
        nearest = np.full(len(aspect), np.inf)
        chosen = buckets[start : start + _CHUNK]
        for number, (bucket_height, bucket_width) in enumerate(sizes):
            distance = np.abs(aspect - math.log(bucket_width / bucket_height))
            better = (distance < nearest) & (high >= bucket_height) & (wide >= bucket_width)
            np.copyto(nearest, distance, where=better)
            chosen[better] = number
    return buckets

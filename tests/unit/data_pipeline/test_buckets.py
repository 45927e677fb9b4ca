"""Aspect-ratio buckets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.stream.buckets import NO_BUCKET, assign, bucket_sizes


@settings(max_examples=100, deadline=None)
@given(patches=st.integers(1, 64), multiple=st.sampled_from([1, 8, 16, 64]), max_aspect=st.floats(1, 5))
def test_bucket_sizes(patches: int, multiple: int, max_aspect: float) -> None:
    side = patches * multiple
    sizes = bucket_sizes(side, multiple=multiple, max_aspect=max_aspect)
    assert sizes[0] == (side, side) and len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert abs(height * width / side**2 - 1) <= 0.1
        assert max(height, width) / min(height, width) <= max_aspect
    if patches >= 8 and max_aspect >= 2:
        assert len(sizes) >= 5


def test_impossible_buckets_are_refused() -> None:
    for resolution, multiple, max_aspect in ((100, 16, 2.0), (0, 16, 2.0), (64, 0, 2.0), (64, 16, 0.5)):
        with pytest.raises(ValueError):
            bucket_sizes(resolution, multiple=multiple, max_aspect=max_aspect)
    with pytest.raises(ValueError):
        bucket_sizes(64, multiple=16, max_aspect=float("nan"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 1500)), max_size=60))
def test_images_get_the_nearest_bucket_they_cover(images: list[tuple[int, int]]) -> None:
    sizes = bucket_sizes(256, multiple=16, max_aspect=3.0)
    table = np.array(images, dtype=np.uint16).reshape(-1, 2)
    for (height, width), number in zip(images, assign(table[:, 0], table[:, 1], sizes), strict=True):
        covered = [(h, w) for h, w in sizes if height >= h and width >= w]
        if number == NO_BUCKET:
            assert not covered
            continue
        assert sizes[number] in covered
        distances = [abs(np.log(width / height) - np.log(w / h)) for h, w in covered]
        h, w = sizes[number]
        assert abs(np.log(width / height) - np.log(w / h)) <= min(distances) + 1e-12


def test_buckets_do_not_depend_on_the_chunks() -> None:
    random = np.random.default_rng(0)
    height, width = random.integers(100, 900, (2, 200_000)).astype(np.uint16)
    sizes = bucket_sizes(256, multiple=32, max_aspect=2.0)
    whole = assign(height, width, sizes)
    pieces = [assign(height[i : i + 999], width[i : i + 999], sizes) for i in range(0, len(height), 999)]
    assert np.array_equal(whole, np.concatenate(pieces)) and set(whole) == set(range(-1, len(sizes)))

"""Equals are told apart by a rule, never by chance: the first of two buckets, the newer of two checkpoints."""

import itertools

import numpy as np
import pytest

from data_pipeline.stream.buckets import assign
from deco_scale.checkpoint.config import CheckpointConfig, KeepBest
from deco_scale.checkpoint.retention import retained

PAIR = [(16, 32), (32, 16)]
"""Of a square, a wide and a tall bucket are equally far."""


def bucket_of(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    (number,) = assign(np.array([size[0]], np.uint16), np.array([size[1]], np.uint16), sizes)
    return sizes[number]


@pytest.mark.parametrize("sizes", list(itertools.permutations([*PAIR, (16, 64), (64, 16)])))
def test_of_two_buckets_equally_near_the_first_is_taken(sizes: tuple[tuple[int, int], ...]) -> None:
    assert bucket_of((64, 64), list(sizes)) == next(size for size in sizes if size in PAIR)


def test_of_two_buckets_of_one_shape_the_first_that_is_covered_is_taken() -> None:
    sizes = [(64, 64), (32, 32), (16, 16)]
    assert bucket_of((64, 64), sizes) == (64, 64) and bucket_of((64, 64), sizes[::-1]) == (16, 16)
    assert bucket_of((63, 63), sizes) == (32, 32)


def test_a_bucket_of_just_the_image_s_size_is_covered() -> None:
    assert bucket_of((16, 32), PAIR) == (16, 32) and bucket_of((32, 16), PAIR) == (32, 16)
    for size in ((15, 32), (16, 31)):
        assert assign(np.array(size[:1], np.uint16), np.array(size[1:], np.uint16), PAIR).tolist() == [-1]


def best(scores: dict[int, float], count: int = 1, mode: str = "min") -> set[int]:
    """Kept beside the last one, which is given no score."""
    cfg = CheckpointConfig(
        every=1,
        keep_last=1,
        keep_best=KeepBest(metric="loss", mode=mode, count=count),  # type: ignore[arg-type]
    )
    metrics = {step: {"loss": score} for step, score in scores.items()}
    return retained([*scores, 99], cfg, lambda step: metrics.get(step, {})) - {99}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("order", list(itertools.permutations([3, 7, 12])))
def test_of_checkpoints_with_the_same_score_the_newer_are_kept(order: tuple[int, ...], mode: str) -> None:
    scores = dict.fromkeys(order, 0.5)
    assert best(scores, 1, mode) == {12}
    assert best(scores, 2, mode) == {7, 12}
    assert best(scores, 3, mode) == best(scores, 4, mode) == {3, 7, 12}


def test_a_better_score_comes_before_a_newer_step() -> None:
    scores = {1: 0.2, 2: 0.5, 3: 0.5, 4: 0.9}
    assert best(scores, 1, "min") == {1} and best(scores, 2, "min") == {1, 3}
    assert best(scores, 1, "max") == {4} and best(scores, 2, "max") == {3, 4}


def test_zeros_of_either_sign_are_equals() -> None:
    assert best({1: -0.0, 2: 0.0}) == best({1: 0.0, 2: -0.0}) == {2}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_never_the_best(score: float, mode: str) -> None:
    assert best({1: 0.5, 2: score}, 1, mode) == {1} and best({2: score}, 2, mode) == set()


def test_the_last_every_kth_the_best_and_those_held_are_kept_together() -> None:
    scores = {step: abs(step - 5) for step in range(1, 13)}
    cfg = CheckpointConfig(every=1, keep_last=2, keep_every=4, keep_best=KeepBest(metric="loss"))
    found = retained(scores, cfg, lambda step: {"loss": scores[step]}, protected={3, 50})
    assert found == {11, 12} | {4, 8} | {5} | {3}

"""Precision and recall at the edges of their definition: points on a ball's surface, and duplicates.

The features are small integers, so that every distance is exact and a point on a surface is exactly on it.
"""

import pytest
import torch
from torch import Tensor

from deco_scale.evaluation.fid import precision_recall


def points(*rows: tuple[float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Symmetric about the origin, so centring changes nothing; each ball reaches to the other point of its pair.
REFERENCE = points((-8, 0), (-4, 0), (4, 0), (8, 0))


@pytest.mark.parametrize("block", [1, 3, 4096])
def test_a_point_on_the_surface_of_a_ball_is_inside(block: int) -> None:
    """Radius 4 around (8, 0): (12, 0) and (8, 4) are on the surface, (13, 0) and (8, 5) outside."""
    samples = points((12, 0), (8, 4), (13, 0), (8, 5))
    precision, _ = precision_recall(samples, REFERENCE, neighbours=1, block=block)
    assert precision == 0.5
    # The same for recall, with the two sets exchanged: the manifold is then that of the samples.
    centred = points((12, 0), (-12, 0), (8, 4), (8, -4), (-8, 4), (-8, -4), (100, 0), (-100, 0))
    _, recall = precision_recall(REFERENCE, centred, neighbours=1, block=block)
    assert recall == 0.75


def test_radius_reaches_exactly_the_kth_neighbour() -> None:
    """Around 0 on a line, neighbours lie at 1, 2 and 4: a sample at -4 is inside for 3 neighbours only."""
    reference = points((0, 0), (1, 0), (2, 0), (4, 0))
    reference = reference - reference.mean(dim=0)
    sample = reference[:1] - points((4, 0))
    samples = torch.cat([sample, sample + points((0, 100)), sample + points((0, 200)), sample + points((0, 300))])
    assert [precision_recall(samples, reference, neighbours=k)[0] for k in (1, 2, 3)] == [0.0, 0.0, 0.25]


@pytest.mark.parametrize("block", [1, 3, 4096])
def test_a_duplicate_is_a_neighbour_at_distance_zero(block: int) -> None:
    """Two copies of each point: the nearest other feature is the copy, so balls of one neighbour are points."""
    reference = torch.cat([REFERENCE, REFERENCE])
    samples = torch.cat([REFERENCE[:2], REFERENCE[2:] + points((0, 1))])
    precision, _ = precision_recall(samples, reference, neighbours=1, block=block)
    assert precision == 0.5
    # The second neighbour is a real one again, at distance 4.
    assert precision_recall(samples, reference, neighbours=2, block=block)[0] == 1.0


def test_repeated_samples_count_once_each_in_precision_and_add_nothing_to_recall() -> None:
    """A generator that repeats one reference point has perfect precision and covers only that point."""
    samples = REFERENCE[:1].expand(4, 2)
    assert precision_recall(samples, REFERENCE, neighbours=1) == (1.0, 0.25)
    doubled = torch.cat([REFERENCE, points((0, 50), (0, 60), (0, 50), (0, 60))])
    precision, recall = precision_recall(doubled, REFERENCE, neighbours=1)
    assert (precision, recall) == (0.5, 1.0)

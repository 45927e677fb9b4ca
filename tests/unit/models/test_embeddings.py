"""Positions: which axis an angle or a feature belongs to, on grids that are not square."""

import math

import pytest
import torch

from deco_scale.models.embeddings import PixelFeatures, PositionScale, pixel_position_features, rope_angles
from tests.support import formulas

CPU = torch.device("cpu")


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 5), (5, 1), (4, 4), (7, 16)])
@pytest.mark.parametrize("scale", ["grid", "fixed"])
def test_rotary_angles_alternate_between_column_and_row(grid: tuple[int, int], scale: PositionScale) -> None:
    (rows, cols), head_dim = grid, 12
    angles = rope_angles(rows, cols, head_dim=head_dim, scale=scale, device=CPU)
    assert angles.shape == (rows * cols, head_dim // 2) and angles.dtype == torch.float32
    for row in range(rows):
        for col in range(cols):
            # Both end points are there; an axis of one patch stands at 0.
            x = col * (cols if scale == "grid" else 16) / max(cols - 1, 1)
            y = row * (rows if scale == "grid" else 16) / max(rows - 1, 1)
            expected = [z * 10_000 ** (-i / head_dim) for i in (0, 4, 8) for z in (x, y)]
            assert angles[row * cols + col].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_step_along_one_axis_rotates_only_the_pairs_of_that_axis() -> None:
    angles = rope_angles(3, 5, head_dim=16, scale="grid", device=CPU).view(3, 5, 4, 2)
    columns, rows = angles.diff(dim=1), angles.diff(dim=0)
    assert bool((columns[..., 0] > 0).all()) and not columns[..., 1].any()
    assert bool((rows[..., 1] > 0).all()) and not rows[..., 0].any()
    # A step is n / (n - 1) patches long, each axis with its own n.
    assert columns[0, 0, 0, 0].item() == pytest.approx(5 / 4) and rows[0, 0, 0, 1].item() == pytest.approx(3 / 2)


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["rotary", "cosine"])
def test_pixel_features_equal_the_formulas(patch_size: int, kind: PixelFeatures) -> None:
    found = pixel_position_features(patch_size, kind=kind, device=CPU)
    expected = formulas.pixel_features(patch_size, is_text=kind == "rotary")
    assert found.shape == (patch_size**2, 64)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["rotary", "cosine"])
def test_pixels_lie_row_by_row_and_columns_come_first(kind: PixelFeatures) -> None:
    """The pixel right of the first differs where x is meant, the one below it where y is meant."""
    # In fp32 the cosines of the lowest rotary frequencies are 1 everywhere.
    features = torch.arange(64)[: 16 if kind == "rotary" else 64]
    table = pixel_position_features(4, kind=kind, device=CPU)[:, : len(features)]
    first, right, below = table[0], table[1], table[4]
    if kind == "rotary":
        of_column, of_row = features % 2 == 0, features % 2 == 1
        assert right[0].item() == pytest.approx(math.cos(4 / 3))
    else:
        # Features (fx, fy), fy running fastest; where fx is 0, x does not matter.
        of_column, of_row = features >= 8, features % 8 > 0
    assert torch.equal(right != first, of_column) and torch.equal(below != first, of_row)

"""Timestep features, 2-D rotary angles and pixel position features.

Source: DeCo (arXiv 2511.19365), section 3, and its release. All are pure functions of shapes and settings. There
are no buffers, which a model on the meta device would lose.

Shape letters: B batch, N patches (row-major), E pairs of one head, P pixels of a patch (row-major), F features.
"""

import math
from typing import Literal

import torch
from torch import Tensor

TIMESTEP_FEATURES = 256
TIMESTEP_MAX_PERIOD = 10.0
ROPE_THETA = 10_000.0
PIXEL_FEATURES = 64

PositionScale = Literal["grid", "fixed"]
PixelFeatures = Literal["rotary", "cosine"]


def timestep_features(t_B: Tensor) -> Tensor:
    """Sinusoids ``(B, 256)`` of times in [0, 1], cosines first; the longest period is 10 (times unscaled)."""
    half = TIMESTEP_FEATURES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles = t_B.float()[:, None] * torch.exp(-math.log(TIMESTEP_MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_angles(rows: int, cols: int, *, head_dim: int, scale: PositionScale, device: torch.device) -> Tensor:
    """Rotary angles ``(N, head_dim / 2)`` of a patch grid in fp32, pairs ordered x0, y0, x1, y1, ...

    ``grid`` runs each axis from 0 to its own number of patches (text model), ``fixed`` from 0 to 16
    (class model). End points are included, as in the release; for non-square grids the release swaps
    the axes of the text model, which docs/deviations.md records as not followed.
    """
    row_end, col_end = (rows, cols) if scale == "grid" else (16.0, 16.0)
    frequencies = 1.0 / ROPE_THETA ** (torch.arange(0, head_dim, 4, device=device).float() / head_dim)
    col_angles = torch.outer(torch.linspace(0, col_end, cols, device=device), frequencies)
    row_angles = torch.outer(torch.linspace(0, row_end, rows, device=device), frequencies)
    pairs = [col_angles[None, :, :].expand(rows, cols, -1), row_angles[:, None, :].expand(rows, cols, -1)]
    return torch.stack(pairs, dim=-1).reshape(rows * cols, -1)


def pixel_position_features(patch_size: int, *, kind: PixelFeatures, device: torch.device) -> Tensor:
    """Features ``(P, 64)`` of the pixels of a patch.

    ``rotary`` (text model): cosines of 32 rotary frequencies per axis, columns and rows interleaved.
    ``cosine`` (class model): products of 8 x 8 cosines damped by 1 / (1 + fx * fy), fy running fastest.
    """
    if kind == "rotary":
        dim = 2 * PIXEL_FEATURES
        return rope_angles(patch_size, patch_size, head_dim=dim, scale="grid", device=device).cos()
    frequencies = torch.linspace(0, 8, 8, device=device)
    positions = torch.linspace(0, 1, patch_size, device=device)
    waves = torch.cos(positions[:, None] * frequencies * math.pi)
    damping = 1.0 / (1.0 + frequencies[:, None] * frequencies[None, :])
    features = waves[None, :, :, None] * waves[:, None, None, :] * damping
    return features.reshape(patch_size * patch_size, PIXEL_FEATURES)

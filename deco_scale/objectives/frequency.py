"""Frequency-aware loss: squared error of 8 x 8 DCT coefficients of YCbCr, weighted as JPEG quantises.

Source: DeCo (arXiv 2511.19365), section 3.3; tables of ITU-T T.81 annex K, colours of JFIF 1.02.
Shape letters: M images or patches, Y X pixels, U V frequencies.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_scale.objectives.config import FrequencyMode

BLOCK = 8
CPU = torch.device("cpu")

_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def dct_matrix(device: torch.device = CPU) -> Tensor:
    """Orthonormal DCT-II as ``(8, 8)``, frequencies in rows; fp32 throughout, as in the release.

    Like the other constants of this file it is made and copied to a device once, since a copy in every step
    would wait for the device. Callers must not write to it.
    """
    n = torch.arange(BLOCK, dtype=torch.float32, device="cpu")
    matrix = torch.cos(math.pi * (2 * n + 1) * n[:, None] / (2 * BLOCK))
    scale = torch.full((BLOCK, 1), math.sqrt(2 / BLOCK), device="cpu")
    scale[0] = math.sqrt(1 / BLOCK)
    return (scale * matrix).to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def colour_matrix(device: torch.device) -> Tensor:
    """RGB to YCbCr as ``(3, 3)``, without offsets."""
    return torch.tensor(_YCBCR, device="cpu").to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def block_transform(device: torch.device) -> Tensor:
    """The DCT of a whole block as ``(64, 64)``: row-major coefficients from row-major pixels."""
    matrix = dct_matrix()
    return torch.kron(matrix, matrix).to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def frequency_weights(quality: int, *, gamma: float, mode: FrequencyMode, device: torch.device = CPU) -> Tensor:
    """Weights ``(3, 8, 8)`` of Y, Cb, Cr, each with mean one; low ``quality`` (JPEG's) spreads them."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    tables = []
    for base in (_LUMA, _CHROMA, _CHROMA):
        steps = torch.tensor(base, dtype=torch.float32, device="cpu")
        steps = ((steps * scale + 50) / 100).floor().clamp(1, 255)
        weight = 1.0 / steps if mode == "inv" else (steps.mean() / steps) ** gamma
        tables.append(weight / weight.mean())
    return torch.stack(tables).to(device)


def block_dct(image_MCYX: Tensor) -> Tensor:
    """DCT of every 8 x 8 block, ``(M, C, Y / 8, X / 8, 8, 8)``; other sizes are padded by reflection."""
    pad_y, pad_x = -image_MCYX.shape[-2] % BLOCK, -image_MCYX.shape[-1] % BLOCK
    if pad_y or pad_x:
        image_MCYX = F.pad(image_MCYX, (0, pad_x, 0, pad_y), mode="reflect")
    blocks = image_MCYX.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).transpose(-3, -2)
    matrix = dct_matrix(image_MCYX.device)
    return matrix @ blocks @ matrix.T


def frequency_loss(error_MCYX: Tensor, weights_3UV: Tensor) -> Tensor:
    """Weighted mean of the squared DCT coefficients of an RGB error, in fp32 whatever autocast says.

    Colour transform and DCT are linear, so the error of the velocities is transformed once instead
    of both velocities (equal in exact arithmetic).
    """
    with torch.autocast(error_MCYX.device.type, enabled=False):
        ycbcr = torch.einsum("dc,mcyx->mdyx", colour_matrix(error_MCYX.device), error_MCYX.float())
        squared = block_dct(ycbcr).square()
    return (weights_3UV[None, :, None, None] * squared).mean()

"""RMSNorm with what follows it (AdaLN modulation or rotary position), and the gated residual.

Each function has two implementations: plain torch here, and Triton kernels (one forward, one backward) in
:mod:`deco_scale.kernels.triton` (``adaln``, ``rope``), imported on first use. The
Triton kernels save only their inputs for backward.

In fp32 the two differ only in the order of summation. In bf16 the norm itself (see :func:`rms_norm`) and the
rotary position are rounded alike; the differences are:
- modulation: torch rounds ``1 + scale`` and the product before it adds the shift; the kernel rounds once;
- gated residual: torch rounds ``gate * y`` before the sum; the kernel rounds once;
- backward: torch rounds after each of those steps, and ``cast_first`` sums the weight's gradient from rounded
  products; the kernels compute in fp32 and round each gradient once.

Shape letters: B batch, N tokens, D model width, H heads, K head width, E pairs of one head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_scale.kernels.select import Kernels


def _accurate(x: Tensor) -> Tensor:
    """In fp32, or in float64 if it is: tests ask the same formulas for more digits."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, cast_first: bool, kernels: Kernels) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension, with fp32 statistics, in the dtype of ``x``.

    The product with ``weight`` is taken in fp32 and rounded, or, with ``cast_first``, of both factors rounded to
    the dtype of ``x``. The Triton kernel takes (B, N, D) or (B, N, H, K).
    """
    if kernels == "triton":
        from deco_scale.kernels.triton import adaln, rope

        if x.ndim == 4:
            return rope.norm_rotate(x, weight, None, eps, cast_first)
        return adaln.norm_modulate(x, weight, None, None, eps, cast_first)
    normed = F.rms_norm(_accurate(x), (x.shape[-1],), eps=eps)
    if cast_first:
        return weight.to(x.dtype) * normed.to(x.dtype)
    return (_accurate(weight) * normed).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN's affine map, identity at zero shift and scale."""
    return x * (1 + scale) + shift


def norm_modulate(
    x_BND: Tensor, weight_D: Tensor, shift_B1D: Tensor, scale_B1D: Tensor,
    *, eps: float, cast_first: bool, kernels: Kernels,
) -> Tensor:  # fmt: skip
    """``modulate(rms_norm(x, weight), shift, scale)`` in the dtype to which x, shift and scale promote."""
    if kernels == "triton":
        from deco_scale.kernels.triton.adaln import norm_modulate as fused

        return fused(x_BND, weight_D, shift_B1D, scale_B1D, eps, cast_first)
    normed = rms_norm(x_BND, weight_D, eps=eps, cast_first=cast_first, kernels=kernels)
    return modulate(normed, shift_B1D, scale_B1D)


def rotate(x_BNHK: Tensor, angles_NE: Tensor) -> Tensor:
    """Rotate adjacent pairs of the last dimension in fp32; returns the input's dtype."""
    cos_NE, sin_NE = angles_NE.cos()[:, None, :], angles_NE.sin()[:, None, :]
    even, odd = _accurate(x_BNHK).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos_NE - odd * sin_NE, even * sin_NE + odd * cos_NE], dim=-1)
    return rotated.flatten(-2).to(x_BNHK.dtype)


def norm_rotate(
    x_BNHK: Tensor, weight_K: Tensor, angles_NE: Tensor, *, eps: float, cast_first: bool, kernels: Kernels
) -> Tensor:
    """``rotate(rms_norm(x, weight), angles)`` in the dtype of ``x``; ``angles`` are fp32 and get no gradient."""
    if kernels == "triton":
        from deco_scale.kernels.triton.rope import norm_rotate as fused

        return fused(x_BNHK, weight_K, angles_NE, eps, cast_first)
    return rotate(rms_norm(x_BNHK, weight_K, eps=eps, cast_first=cast_first, kernels=kernels), angles_NE)


def gated_residual(x_BND: Tensor, gate_B1D: Tensor, y_BND: Tensor, *, kernels: Kernels) -> Tensor:
    """``x + gate * y`` in the dtype to which the three promote."""
    if kernels == "triton":
        from deco_scale.kernels.triton.adaln import gated_residual as fused

        return fused(x_BND, gate_B1D, y_BND)
    return x_BND + gate_B1D * y_BND

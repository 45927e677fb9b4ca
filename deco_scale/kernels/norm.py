"""What lies between the linears and attention of a block: norms, modulation, rotary position, gated residual.

Each function has two implementations: plain torch here, and Triton kernels (one forward, one backward) in
:mod:`deco_scale.kernels.triton` (``adaln``, ``rope``), imported on first use. The Triton kernels save only inputs
and the residual stream for backward.

In fp32 the two differ only in the order of summation. In bf16 the norm itself (see :func:`rms_norm`) and the
rotary position are rounded alike; the differences are:
- modulation: torch rounds ``1 + scale`` and the product before it adds the shift; the kernel rounds once;
- gated residual: torch rounds ``gate * y`` before the sum; the kernel rounds once;
- backward: torch rounds after each of those steps, and ``cast_first`` sums the weight's gradient from rounded
  products; the kernels compute in fp32 and round each gradient once.

Shape letters: B batch, N tokens, L tokens of the context, D model width, H heads, K head width, P parts of a fused
projection, E pairs of one head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_scale.kernels.select import Kernels


def _accurate(x: Tensor) -> Tensor:
    """In fp32, or in float64 if it is: tests ask the same formulas for more digits."""
    return x if x.dtype == torch.float64 else x.float()


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    """``x / rms(x)``; tokens that lie in memory sequence first, as under tensor parallelism, stay so uncopied."""
    if not x.is_contiguous() and x.transpose(0, 1).is_contiguous():
        return F.rms_norm(x.transpose(0, 1), (x.shape[-1],), eps=eps).transpose(0, 1)
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, cast_first: bool, kernels: Kernels) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension, with fp32 statistics, in the dtype of ``x``.

    The product with ``weight`` is taken in fp32 and rounded, or, with ``cast_first``, of both factors rounded to
    the dtype of ``x``. The Triton kernel takes (B, N, D).
    """
    if kernels == "triton":
        from deco_scale.kernels.triton.adaln import norm_modulate as fused

        return fused(x, weight, None, None, eps, cast_first)
    normed = _rms_norm(_accurate(x), eps)
    if cast_first:
        return weight.to(x.dtype) * normed.to(x.dtype)
    return (_accurate(weight) * normed).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN's affine map, identity at zero shift and scale."""
    return x * (1 + scale) + shift


def norm_modulate(
    x_BND: Tensor, weight_D: Tensor, shift_B1D: Tensor, scale_B1D: Tensor,
    *, eps: float, cast_first: bool, kernels: Kernels,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x for the residual connection, and ``modulate(rms_norm(x, weight), shift, scale)``.

    The second is in the dtype to which x, shift and scale promote. x itself is returned so that one backward
    kernel adds up its two gradients.
    """
    if kernels == "triton":
        from deco_scale.kernels.triton.adaln import norm_modulate_with_residual

        return norm_modulate_with_residual(x_BND, weight_D, shift_B1D, scale_B1D, eps, cast_first)
    normed = rms_norm(x_BND, weight_D, eps=eps, cast_first=cast_first, kernels=kernels)
    return x_BND, modulate(normed, shift_B1D, scale_B1D)


def rotate(x_BNHK: Tensor, angles_NE: Tensor) -> Tensor:
    """Rotate adjacent pairs of the last dimension in fp32; returns the input's dtype."""
    cos_NE, sin_NE = angles_NE.cos()[:, None, :], angles_NE.sin()[:, None, :]
    even, odd = _accurate(x_BNHK).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos_NE - odd * sin_NE, even * sin_NE + odd * cos_NE], dim=-1)
    return rotated.flatten(-2).to(x_BNHK.dtype)


def gated_residual(x_BND: Tensor, gate_B1D: Tensor, y_BND: Tensor, *, kernels: Kernels) -> Tensor:
    """``x + gate * y`` in the dtype to which the three promote."""
    if kernels == "triton":
        from deco_scale.kernels.triton.adaln import gated_residual as fused

        return fused(x_BND, gate_B1D, y_BND)
    return x_BND + gate_B1D * y_BND


def residual_norm_modulate(
    x_BND: Tensor, gate_B1D: Tensor, y_BND: Tensor, weight_D: Tensor, shift_B1D: Tensor, scale_B1D: Tensor,
    *, eps: float, cast_first: bool, kernels: Kernels,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual stream ``x + gate * y``, and its :func:`norm_modulate`: what lies between attention and MLP."""
    if kernels == "triton":
        from deco_scale.kernels.triton.adaln import residual_norm_modulate as fused

        return fused(x_BND, gate_B1D, y_BND, weight_D, shift_B1D, scale_B1D, eps, cast_first)
    x_BND = gated_residual(x_BND, gate_B1D, y_BND, kernels=kernels)
    return norm_modulate(x_BND, weight_D, shift_B1D, scale_B1D, eps=eps, cast_first=cast_first, kernels=kernels)


def qk_norm_rope(
    qkv_BNHPK: Tensor, context_kv_BLHPK: Tensor | None, q_weight_K: Tensor, k_weight_K: Tensor,
    angles_NE: Tensor | None, *, eps: float, cast_first: bool, kernels: Kernels,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q (B, N, H, K) and the joint k and v (B, N + L, H, K) of tokens and context, as attention takes them.

    Parts P of ``qkv`` are q, k, v, those of ``context_kv`` k and v. All q and k are normed, those of the tokens
    also rotated where angles are given.
    """
    if kernels == "triton":
        from deco_scale.kernels.triton.rope import qk_norm_rope as fused

        return fused(qkv_BNHPK, context_kv_BLHPK, q_weight_K, k_weight_K, angles_NE, eps, cast_first)

    def normed(x: Tensor, weight_K: Tensor) -> Tensor:
        return rms_norm(x, weight_K, eps=eps, cast_first=cast_first, kernels=kernels)

    q, k, v = qkv_BNHPK.unbind(-2)
    q, k = normed(q, q_weight_K), normed(k, k_weight_K)
    if angles_NE is not None:
        q, k = rotate(q, angles_NE), rotate(k, angles_NE)
    if context_kv_BLHPK is not None:
        context_k, context_v = context_kv_BLHPK.unbind(-2)
        k = torch.cat([k, normed(context_k, k_weight_K)], dim=1)
        v = torch.cat([v, context_v], dim=1)
    return q, k, v

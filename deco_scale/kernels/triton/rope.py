"""Triton kernels of the norm of queries and keys with rotary position. Not yet run on a GPU.

The twin is :func:`deco_scale.kernels.norm.norm_rotate`. A program takes all heads of a token at once, reads them
where they lie in the fused projection, and goes on to the next token. Cosines and sines are computed in the
kernel, K/2 of each per token for all its H * K values: that spares a table in memory and the launches to make it.

Shape letters: B batch, N tokens, H heads, K head width, E pairs of one head, G programs.
"""
# mypy: allow-untyped-defs
# The arguments of kernels have no Python type; rules for shapes repeat the operators' arguments.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deco_scale.kernels.triton.adaln import MAX_ROW, check_dtypes, load_fp32, round_norm, rows
from deco_scale.kernels.triton.operators import operator

FORWARD_TOKENS = 4
BACKWARD_TOKENS = 16
"""Tokens of a program; not yet tuned."""


@triton.jit
def _own_part(all_tokens, heads, dim, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's first token and its end; heads (HEADS, 1), columns (BLOCK), and where a head has a column."""
    first = tl.program_id(0) * TOKENS
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)
    inside = (head < heads) & (column < dim)[None, :]
    return first, tl.minimum(first + TOKENS, all_tokens), head, column, inside


@triton.jit
def _load_angles(angles_ptr, token, dim, BLOCK: tl.constexpr):
    """A token's angles (BLOCK / 2), zero beyond its pairs."""
    pair = tl.arange(0, BLOCK // 2)
    return tl.load(angles_ptr + token * (dim // 2) + pair, mask=pair < dim // 2, other=0.0)


@triton.jit
def _rotated(x, angles, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Adjacent pairs of ``x`` (HEADS, BLOCK) turned by ``angles`` (BLOCK / 2)."""
    cos, sin = tl.cos(angles)[None, :], tl.sin(angles)[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, BLOCK // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(pairs, (HEADS, BLOCK))


@triton.jit
def _norm_rotate_forward(
    x_ptr, weight_ptr, angles_ptr, out_ptr,
    all_tokens, tokens, heads, dim, x_stride_b, x_stride_n, x_stride_h, eps,
    ROTATED: tl.constexpr, CAST_FIRST: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, end, head, column, inside = _own_part(all_tokens, heads, dim, TOKENS, HEADS, BLOCK)
    weight = load_fp32(weight_ptr, column, column < dim)[None, :]
    # Over the tokens of all samples.
    for index in range(first, end):
        sample, token = (index // tokens).to(tl.int64), index % tokens
        offset = sample * x_stride_b + token * x_stride_n + head * x_stride_h + column[None, :]
        x = load_fp32(x_ptr, offset, inside)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / dim + eps)
        out = round_norm(x, weight, rstd, x_ptr.dtype.element_ty, CAST_FIRST)
        if ROTATED:
            angles = _load_angles(angles_ptr, token, dim, BLOCK)
            out = _rotated(out, angles, HEADS, BLOCK)
        out_offset = ((sample * tokens + token) * heads + head) * dim + column[None, :]
        tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate_backward(
    grad_ptr, x_ptr, weight_ptr, angles_ptr, grad_x_ptr, partial_ptr,
    all_tokens, tokens, heads, dim,
    grad_stride_b, grad_stride_n, grad_stride_h, x_stride_b, x_stride_n, x_stride_h, eps,
    ROTATED: tl.constexpr, CAST_FIRST: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and the program's sum of ``grad * x * rstd`` (grad turned back) over tokens and heads."""
    first, end, head, column, inside = _own_part(all_tokens, heads, dim, TOKENS, HEADS, BLOCK)
    weight = load_fp32(weight_ptr, column, column < dim)
    if CAST_FIRST:
        weight = weight.to(x_ptr.dtype.element_ty).to(tl.float32)
    product_sum = tl.zeros([HEADS, BLOCK], tl.float32)
    for index in range(first, end):
        sample, token = (index // tokens).to(tl.int64), index % tokens
        offset = sample * x_stride_b + token * x_stride_n + head * x_stride_h + column[None, :]
        grad_offset = sample * grad_stride_b + token * grad_stride_n + head * grad_stride_h + column[None, :]
        x = load_fp32(x_ptr, offset, inside)
        grad = load_fp32(grad_ptr, grad_offset, inside)
        if ROTATED:
            angles = _load_angles(angles_ptr, token, dim, BLOCK)
            grad = _rotated(grad, -angles, HEADS, BLOCK)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / dim + eps)
        unit = x * rstd
        product_sum += grad * unit
        grad_unit = grad * weight[None, :]
        grad_x = rstd * (grad_unit - unit * (tl.sum(grad_unit * unit, axis=1, keep_dims=True) / dim))
        out_offset = ((sample * tokens + token) * heads + head) * dim + column[None, :]
        tl.store(grad_x_ptr + out_offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * dim + column
    tl.store(partial, tl.sum(product_sum, axis=0), mask=column < dim)


def _check(x_BNHK: Tensor, weight_K: Tensor, angles_NE: Tensor | None) -> None:
    shape = tuple(x_BNHK.shape)
    if len(shape) != 4 or shape[3] % 2 or tuple(weight_K.shape) != shape[3:]:
        raise ValueError(
            f"x must be (B, N, H, K) with even K and weight (K); they are {shape} and {tuple(weight_K.shape)}"
        )
    tile = _tile(*shape[2:])
    if tile["HEADS"] * tile["BLOCK"] > MAX_ROW:
        raise ValueError(
            f"the Triton kernels take heads of up to {MAX_ROW} values together, each count padded to a power of "
            f"two, not {shape[2:]}; use kernels=torch"
        )
    check_dtypes(x=x_BNHK, weight=weight_K)
    if angles_NE is None:
        return
    expected, given = (shape[1], shape[3] // 2), tuple(angles_NE.shape)
    if given != expected or angles_NE.dtype != torch.float32:
        raise ValueError(f"angles must be {expected} in float32 for x {shape}, not {given} in {angles_NE.dtype}")


def _tile(heads: int, dim: int) -> dict[str, int]:
    """Size of the tile that holds a token's heads, and warps for about sixteen values of it per thread."""
    padded, block = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    return {"HEADS": padded, "BLOCK": block, "num_warps": max(1, min(8, padded * block // 512))}


@operator("deco_scale::norm_rotate")
def norm_rotate(x: Tensor, weight: Tensor, angles: Tensor | None, eps: float, cast_first: bool) -> Tensor:
    """RMSNorm of x (B, N, H, K) over K, then its pairs turned by angles (N, K / 2) if given; a dense tensor.

    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    _check(x, weight, angles)
    batch, tokens, heads, dim = x.shape
    out = x.new_empty(x.shape)
    x, weight = rows(x), weight.contiguous()
    angles = None if angles is None else angles.contiguous()
    _norm_rotate_forward[(triton.cdiv(batch * tokens, FORWARD_TOKENS),)](
        x, weight, angles, out,
        batch * tokens, tokens, heads, dim, *x.stride()[:3], eps,
        ROTATED=angles is not None, CAST_FIRST=cast_first, TOKENS=FORWARD_TOKENS, **_tile(heads, dim),
    )  # fmt: skip
    return out


@norm_rotate.register_fake
def _(x, weight, angles, eps, cast_first):
    return x.new_empty(x.shape)


@operator("deco_scale::norm_rotate_backward")
def norm_rotate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, angles: Tensor | None, eps: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x, dense, and fp32 partial sums (G, K) of the weight's gradient."""
    batch, tokens, heads, dim = x.shape
    grad, x, weight = rows(grad), rows(x), weight.contiguous()
    angles = None if angles is None else angles.contiguous()
    grad_x, partial = _backward_outputs(x)
    _norm_rotate_backward[(len(partial),)](
        grad, x, weight, angles, grad_x, partial,
        batch * tokens, tokens, heads, dim, *grad.stride()[:3], *x.stride()[:3], eps,
        ROTATED=angles is not None, CAST_FIRST=cast_first, TOKENS=BACKWARD_TOKENS, **_tile(heads, dim),
    )  # fmt: skip
    return grad_x, partial


@norm_rotate_backward.register_fake
def _(grad, x, weight, angles, eps, cast_first):
    return _backward_outputs(x)


def _backward_outputs(x_BNHK: Tensor) -> tuple[Tensor, Tensor]:
    programs = (x_BNHK.shape[0] * x_BNHK.shape[1] + BACKWARD_TOKENS - 1) // BACKWARD_TOKENS
    return x_BNHK.new_empty(x_BNHK.shape), x_BNHK.new_empty((programs, x_BNHK.shape[3]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, angles, ctx.eps, ctx.cast_first = inputs
    ctx.save_for_backward(x, weight, angles)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, angles = ctx.saved_tensors
    grad_x, partial = norm_rotate_backward(grad, x, weight, angles, ctx.eps, ctx.cast_first)
    return grad_x, partial.sum(0).to(weight.dtype), None, None, None


norm_rotate.register_autograd(_gradients, setup_context=_save)

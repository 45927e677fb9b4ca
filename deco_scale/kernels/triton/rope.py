"""Triton kernels between fused projections and attention: norm of q and k, rotary position, joint k and v.

Not yet run on a GPU. The twin is :func:`deco_scale.kernels.norm.qk_norm_rope`. A program takes all heads of a
token at once, reads them where they lie in the fused projections, and goes on to the next token: first the
sample's own tokens, then those of its context. k and v of both are written where attention reads them, and
backward writes the whole gradients of both projections. Cosines and sines are computed in the kernel, K/2 of each
per token for all its H * K values: that spares a table in memory and the launches to make it.

Shape letters: B batch, N tokens, L tokens of the context, M = N + L, H heads, K head width, P parts of a fused
projection, E pairs of one head, G programs.
"""
# mypy: allow-untyped-defs
# The arguments of kernels have no Python type; rules for shapes repeat the operators' arguments.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deco_scale.kernels.triton.operators import operator
from deco_scale.kernels.triton.token_rows import MAX_ROW, check_dtypes, empty_tokens, load_fp32, round_norm, rows

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
def _load_angles(angles_ptr, token, tokens, dim, BLOCK: tl.constexpr):
    """A token's angles (BLOCK / 2), zero beyond its pairs and for tokens of the context, from ``tokens`` on."""
    pair = tl.arange(0, BLOCK // 2)
    pairs = tl.where(token < tokens, dim // 2, 0)
    return tl.load(angles_ptr + token * (dim // 2) + pair, mask=pair < pairs, other=0.0)


@triton.jit
def _heads_of(token, tokens, heads, dim, head, column):
    """Where the own token's heads have columns, and where the context's have: one of the two is nowhere."""
    own_heads = tl.where(token < tokens, heads, 0)
    exists = (column < dim)[None, :]
    return (head < own_heads) & exists, (head < heads - own_heads) & exists


@triton.jit
def _rotated(x, angles, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Adjacent pairs of ``x`` (HEADS, BLOCK) turned by ``angles`` (BLOCK / 2)."""
    cos, sin = tl.cos(angles)[None, :], tl.sin(angles)[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, BLOCK // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(pairs, (HEADS, BLOCK))


@triton.jit
def _part_offset(part, sample, token, head, column, stride_b, stride_n, stride_h, stride_p):
    """Offsets (HEADS, BLOCK) of a token's part of a fused projection."""
    return sample * stride_b + token * stride_n + head * stride_h + part * stride_p + column[None, :]


@triton.jit
def _norm(x, weight, dim, eps, rounded: tl.constexpr, CAST_FIRST: tl.constexpr):
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / dim + eps)
    return round_norm(x, weight, rstd, rounded, CAST_FIRST)


@triton.jit
def _qk_norm_rope_forward(
    qkv_ptr, context_ptr, q_weight_ptr, k_weight_ptr, angles_ptr, q_ptr, k_ptr, v_ptr,
    all_tokens, tokens, joint_tokens, heads, dim,
    qkv_stride_b, qkv_stride_n, qkv_stride_h, qkv_stride_p,
    context_stride_b, context_stride_n, context_stride_h, context_stride_p,
    q_stride_b, q_stride_n, k_stride_b, k_stride_n, eps,
    CAST_FIRST: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, end, head, column, inside = _own_part(all_tokens, heads, dim, TOKENS, HEADS, BLOCK)
    rounded: tl.constexpr = qkv_ptr.dtype.element_ty
    q_weight = load_fp32(q_weight_ptr, column, column < dim)[None, :]
    k_weight = load_fp32(k_weight_ptr, column, column < dim)[None, :]
    head_offset = head * dim + column[None, :]
    # Over the tokens of all samples, each with its context.
    for index in range(first, end):
        sample, token = (index // joint_tokens).to(tl.int64), index % joint_tokens
        own, of_context = _heads_of(token, tokens, heads, dim, head, column)
        offset = _part_offset(
            0, sample, token, head, column, qkv_stride_b, qkv_stride_n, qkv_stride_h, qkv_stride_p
        )
        q = load_fp32(qkv_ptr, offset, own)
        k = load_fp32(qkv_ptr, offset + qkv_stride_p, own)
        v = tl.load(qkv_ptr + offset + 2 * qkv_stride_p, mask=own, other=0.0)
        if context_ptr is not None:
            # Of a row, one of the two loads is masked.
            offset = _part_offset(
                0, sample, token - tokens, head, column,
                context_stride_b, context_stride_n, context_stride_h, context_stride_p,
            )  # fmt: skip
            k += load_fp32(context_ptr, offset, of_context)
            v += tl.load(context_ptr + offset + context_stride_p, mask=of_context, other=0.0)
        q = _norm(q, q_weight, dim, eps, rounded, CAST_FIRST)
        k = _norm(k, k_weight, dim, eps, rounded, CAST_FIRST)
        if angles_ptr is not None:
            # By an angle of zero, rows of the context keep their values.
            angles = _load_angles(angles_ptr, token, tokens, dim, BLOCK)
            q, k = _rotated(q, angles, HEADS, BLOCK), _rotated(k, angles, HEADS, BLOCK)
        q_offset = sample * q_stride_b + token * q_stride_n + head_offset
        tl.store(q_ptr + q_offset, q.to(rounded), mask=own)
        k_offset = sample * k_stride_b + token * k_stride_n + head_offset
        tl.store(k_ptr + k_offset, k.to(rounded), mask=inside)
        tl.store(v_ptr + k_offset, v, mask=inside)


@triton.jit
def _norm_gradient(grad, x, weight, dim, eps):
    """Gradient of x, and ``grad * x * rstd``, of which the weight's gradient is a sum."""
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / dim + eps)
    unit = x * rstd
    grad_unit = grad * weight
    grad_x = rstd * (grad_unit - unit * (tl.sum(grad_unit * unit, axis=1, keep_dims=True) / dim))
    return grad_x, grad * unit


@triton.jit
def _qk_norm_rope_backward(
    grad_q_ptr, grad_k_ptr, grad_v_ptr, qk_ptr, context_ptr, q_weight_ptr, k_weight_ptr, angles_ptr,
    grad_qkv_ptr, grad_context_ptr, partial_ptr,
    all_tokens, tokens, joint_tokens, heads, dim,
    grad_q_stride_b, grad_q_stride_n, grad_q_stride_h, grad_k_stride_b, grad_k_stride_n, grad_k_stride_h,
    grad_v_stride_b, grad_v_stride_n, grad_v_stride_h,
    qk_stride_b, qk_stride_n, qk_stride_h, qk_stride_p,
    context_stride_b, context_stride_n, context_stride_h,
    out_stride_b, out_stride_n, context_out_stride_b, context_out_stride_n, eps,
    CAST_FIRST: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of both projections, and the program's sums for the weights of q and k over tokens and heads."""
    first, end, head, column, inside = _own_part(all_tokens, heads, dim, TOKENS, HEADS, BLOCK)
    rounded: tl.constexpr = qk_ptr.dtype.element_ty
    q_weight = load_fp32(q_weight_ptr, column, column < dim)[None, :]
    k_weight = load_fp32(k_weight_ptr, column, column < dim)[None, :]
    if CAST_FIRST:
        q_weight, k_weight = q_weight.to(rounded).to(tl.float32), k_weight.to(rounded).to(tl.float32)
    q_sum = tl.zeros([HEADS, BLOCK], tl.float32)
    k_sum = tl.zeros([HEADS, BLOCK], tl.float32)
    for index in range(first, end):
        sample, token = (index // joint_tokens).to(tl.int64), index % joint_tokens
        own, of_context = _heads_of(token, tokens, heads, dim, head, column)
        offset = _part_offset(0, sample, token, head, column, qk_stride_b, qk_stride_n, qk_stride_h, qk_stride_p)
        out_offset = sample * out_stride_b + token * out_stride_n + head * (3 * dim) + column[None, :]
        grad = load_fp32(
            grad_q_ptr, _part_offset(0, sample, token, head, column,
                                     grad_q_stride_b, grad_q_stride_n, grad_q_stride_h, 0), own
        )  # fmt: skip
        if angles_ptr is not None:
            angles = -_load_angles(angles_ptr, token, tokens, dim, BLOCK)
            grad = _rotated(grad, angles, HEADS, BLOCK)
        grad_x, product = _norm_gradient(grad, load_fp32(qk_ptr, offset, own), q_weight, dim, eps)
        q_sum += product
        tl.store(grad_qkv_ptr + out_offset, grad_x.to(rounded), mask=own)

        k = load_fp32(qk_ptr, offset + qk_stride_p, own)
        if context_ptr is not None:
            offset = _part_offset(
                0, sample, token - tokens, head, column,
                context_stride_b, context_stride_n, context_stride_h, 0,
            )  # fmt: skip
            k += load_fp32(context_ptr, offset, of_context)
        grad = load_fp32(
            grad_k_ptr, _part_offset(0, sample, token, head, column,
                                     grad_k_stride_b, grad_k_stride_n, grad_k_stride_h, 0), inside
        )  # fmt: skip
        if angles_ptr is not None:
            grad = _rotated(grad, angles, HEADS, BLOCK)
        grad_x, product = _norm_gradient(grad, k, k_weight, dim, eps)
        k_sum += product
        grad_v = load_fp32(
            grad_v_ptr, _part_offset(0, sample, token, head, column,
                                     grad_v_stride_b, grad_v_stride_n, grad_v_stride_h, 0), inside
        )  # fmt: skip
        tl.store(grad_qkv_ptr + out_offset + dim, grad_x.to(rounded), mask=own)
        tl.store(grad_qkv_ptr + out_offset + 2 * dim, grad_v.to(rounded), mask=own)
        if context_ptr is not None:
            out_offset = sample * context_out_stride_b + (token - tokens) * context_out_stride_n
            out_offset += head * (2 * dim) + column[None, :]
            tl.store(grad_context_ptr + out_offset, grad_x.to(rounded), mask=of_context)
            tl.store(grad_context_ptr + out_offset + dim, grad_v.to(rounded), mask=of_context)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * dim + column
    tl.store(partial, tl.sum(q_sum, axis=0), mask=column < dim)
    tl.store(partial + dim, tl.sum(k_sum, axis=0), mask=column < dim)


def _check(
    qkv: Tensor, context_kv: Tensor | None, q_weight: Tensor, k_weight: Tensor, angles: Tensor | None
) -> None:
    shape = tuple(qkv.shape)
    if len(shape) != 5 or shape[3] != 3 or shape[4] % 2:
        raise ValueError(f"qkv must be (B, N, H, 3, K) with even K, not {shape}")
    batch, tokens, heads, _, dim = shape
    fitting = {
        "q_weight": (q_weight, (dim,)),
        "k_weight": (k_weight, (dim,)),
        "angles": (angles, (tokens, dim // 2)),
    }
    if context_kv is not None:
        fitting["context_kv"] = (context_kv, (batch, *context_kv.shape[1:2], heads, 2, dim))
        if context_kv.dtype != qkv.dtype:
            raise ValueError(f"context_kv is {context_kv.dtype}, qkv {qkv.dtype}: k and v need one type")
    for name, (tensor, expected) in fitting.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must be {expected} for qkv {shape}, not {tuple(tensor.shape)}")
    if angles is not None and angles.dtype != torch.float32:
        raise ValueError(f"angles must be float32, not {angles.dtype}")
    tile = _tile(heads, dim)
    if tile["HEADS"] * tile["BLOCK"] > MAX_ROW:
        raise ValueError(
            f"the Triton kernels take heads of up to {MAX_ROW} values together, each count padded to a power of "
            f"two, not {(heads, dim)}; use kernels=torch"
        )
    check_dtypes(qkv=qkv, q_weight=q_weight, k_weight=k_weight)


def _tile(heads: int, dim: int) -> dict[str, int]:
    """Size of the tile that holds a token's heads, and warps for about eight values of it per thread."""
    padded, block = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    return {"HEADS": padded, "BLOCK": block, "num_warps": max(1, min(8, padded * block // 256))}


def _joint_tokens(own: Tensor, context: Tensor | None) -> int:
    return own.shape[1] + (0 if context is None else context.shape[1])


@operator("deco_scale::qk_norm_rope")
def qk_norm_rope(
    qkv: Tensor, context_kv: Tensor | None, q_weight: Tensor, k_weight: Tensor, angles: Tensor | None,
    eps: float, cast_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q (B, N, H, K), k and v (B, N + L, H, K) of qkv (B, N, H, 3, K) and context_kv (B, L, H, 2, K) or None.

    q and k are normed, and those of the own tokens rotated by angles (N, K / 2) if given. Raises ``ValueError``
    for shapes or dtypes that do not fit.
    """
    _check(qkv, context_kv, q_weight, k_weight, angles)
    q, k, v = _outputs(qkv, context_kv)
    qkv, q_weight, k_weight = rows(qkv), q_weight.contiguous(), k_weight.contiguous()
    context_kv, angles = None if context_kv is None else rows(context_kv), _dense(angles)
    batch, tokens, heads, _, dim = qkv.shape
    joint = k.shape[1]
    _qk_norm_rope_forward[(triton.cdiv(batch * joint, FORWARD_TOKENS),)](
        qkv, context_kv, q_weight, k_weight, angles, q, k, v,
        batch * joint, tokens, joint, heads, dim, *qkv.stride()[:4], *_strides(context_kv, 4),
        *q.stride()[:2], *k.stride()[:2], eps,
        CAST_FIRST=cast_first, TOKENS=FORWARD_TOKENS, **_tile(heads, dim),
    )  # fmt: skip
    return q, k, v


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


def _outputs(qkv: Tensor, context_kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, _, dim = qkv.shape
    joint = (batch, _joint_tokens(qkv, context_kv), heads, dim)
    return empty_tokens(qkv, (batch, tokens, heads, dim)), empty_tokens(qkv, joint), empty_tokens(qkv, joint)


@qk_norm_rope.register_fake
def _(qkv, context_kv, q_weight, k_weight, angles, eps, cast_first):
    return _outputs(qkv, context_kv)


@operator("deco_scale::qk_norm_rope_backward")
def qk_norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qk: Tensor, context_k: Tensor | None,
    q_weight: Tensor, k_weight: Tensor, angles: Tensor | None, eps: float, cast_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qkv and context_kv (empty if None), and fp32 partial sums (G, 2, K) of those of the weights.

    ``qk`` (B, N, H, 2, K) and ``context_k`` (B, L, H, K) are the parts of the projections without v.
    """
    grad_qkv, grad_context, partial = _gradient_outputs(qk, context_k)
    grad_q, grad_k, grad_v, qk = rows(grad_q), rows(grad_k), rows(grad_v), rows(qk)
    q_weight, k_weight = q_weight.contiguous(), k_weight.contiguous()
    context_k, angles = None if context_k is None else rows(context_k), _dense(angles)
    batch, tokens, heads, _, dim = qk.shape
    joint = _joint_tokens(qk, context_k)
    _qk_norm_rope_backward[(len(partial),)](
        grad_q, grad_k, grad_v, qk, context_k, q_weight, k_weight, angles, grad_qkv, grad_context, partial,
        batch * joint, tokens, joint, heads, dim,
        *grad_q.stride()[:3], *grad_k.stride()[:3], *grad_v.stride()[:3],
        *qk.stride()[:4], *_strides(context_k, 3),
        *grad_qkv.stride()[:2], *_strides(None if context_k is None else grad_context, 2), eps,
        CAST_FIRST=cast_first, TOKENS=BACKWARD_TOKENS, **_tile(heads, dim),
    )  # fmt: skip
    return grad_qkv, grad_context, partial


def _gradient_outputs(qk: Tensor, context_k: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, _, dim = qk.shape
    programs = (batch * _joint_tokens(qk, context_k) + BACKWARD_TOKENS - 1) // BACKWARD_TOKENS
    grad_qkv = empty_tokens(qk, (batch, tokens, heads, 3, dim))
    # An operator returns tensors: an empty one stands for none.
    grad_context = qk.new_empty(0)
    if context_k is not None:
        grad_context = empty_tokens(context_k, (batch, context_k.shape[1], heads, 2, dim))
    return grad_qkv, grad_context, qk.new_empty((programs, 2, dim), dtype=torch.float32)


@qk_norm_rope_backward.register_fake
def _(grad_q, grad_k, grad_v, qk, context_k, q_weight, k_weight, angles, eps, cast_first):
    return _gradient_outputs(qk, context_k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, context_kv, *others, ctx.eps, ctx.cast_first = inputs
    context_k = None if context_kv is None else context_kv.select(-2, 0)
    ctx.save_for_backward(qkv.narrow(-2, 0, 2), context_k, *others)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    qk, context_k, q_weight, k_weight, angles = ctx.saved_tensors
    grad_qkv, grad_context, partial = qk_norm_rope_backward(
        *grads, qk, context_k, q_weight, k_weight, angles, ctx.eps, ctx.cast_first
    )
    grad_q_weight, grad_k_weight = partial.sum(0).unbind()
    return (
        grad_qkv, None if context_k is None else grad_context,
        grad_q_weight.to(q_weight.dtype, copy=True), grad_k_weight.to(k_weight.dtype, copy=True), None, None, None,
    )  # fmt: skip


qk_norm_rope.register_autograd(_gradients, setup_context=_save)

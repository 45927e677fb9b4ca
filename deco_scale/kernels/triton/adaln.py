"""Triton kernels of RMSNorm with AdaLN modulation, of the gated residual, and of one after the other.

Not yet run on a GPU.

The twins and the facts about rounding are in :mod:`deco_scale.kernels.norm`. Every program walks over a few
tokens of one sample, so that what is the same for all tokens (weight, shift, scale, gate) is read once per
program, and sums over tokens (their gradients) are carried in registers. Each program writes its own partial
sums and torch adds them up: the result does not depend on the order in which programs run. The root mean square
is computed again in backward: the row is read there anyway, so keeping it would save nothing.

Shape letters: B batch, N tokens, D model width, G groups of tokens (one program each) of a sample.
"""
# mypy: allow-untyped-defs
# The arguments of kernels have no Python type; rules for shapes repeat the operators' arguments.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deco_scale.kernels.triton.operators import operator
from deco_scale.kernels.triton.token_rows import (
    BACKWARD_TOKENS,
    FORWARD_TOKENS,
    check_dtypes,
    check_rows,
    empty_tokens,
    load_fp32,
    own_part,
    partial_sums,
    promoted,
    round_norm,
    rows,
    tile,
)


@triton.jit
def _norm_modulate_forward(
    x_ptr, weight_ptr, shift_ptr, scale_ptr, out_ptr,
    tokens, dim, x_stride_b, x_stride_n, shift_stride_b, scale_stride_b, out_stride_b, out_stride_n, eps,
    MODULATED: tl.constexpr, CAST_FIRST: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, _, columns, inside, first, end = own_part(tokens, dim, TOKENS, BLOCK)
    weight = load_fp32(weight_ptr, columns, inside)
    if MODULATED:
        shift = load_fp32(shift_ptr + sample * shift_stride_b, columns, inside)
        scale = load_fp32(scale_ptr + sample * scale_stride_b, columns, inside)
    for token in range(first, end):
        x = load_fp32(x_ptr + sample * x_stride_b + token * x_stride_n, columns, inside)
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps)
        out = round_norm(x, weight, rstd, x_ptr.dtype.element_ty, CAST_FIRST)
        if MODULATED:
            out = out * (1.0 + scale) + shift
        out_offset = sample * out_stride_b + token * out_stride_n
        tl.store(out_ptr + out_offset + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_gradient(grad_unit, unit, rstd, dim):
    """Gradient of x, where ``unit = x * rstd`` has the gradient ``grad_unit``."""
    return rstd * (grad_unit - unit * (tl.sum(grad_unit * unit, axis=0) / dim))


@triton.jit
def _norm_modulate_backward(
    grad_ptr, residual_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, partial_ptr,
    tokens, dim, grad_stride_b, grad_stride_n, residual_stride_b, residual_stride_n, x_stride_b, x_stride_n,
    scale_stride_b, out_stride_b, out_stride_n, eps,
    MODULATED: tl.constexpr, CAST_FIRST: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of x, to which that of the residual stream is added, and the partial sums of
    ``grad * x * rstd`` and, if modulated, of ``grad``."""
    sample, group, columns, inside, first, end = own_part(tokens, dim, TOKENS, BLOCK)
    factor = load_fp32(weight_ptr, columns, inside)
    if CAST_FIRST:
        factor = factor.to(x_ptr.dtype.element_ty).to(tl.float32)
    if MODULATED:
        scale = load_fp32(scale_ptr + sample * scale_stride_b, columns, inside)
        factor = factor * (1.0 + scale)
    product_sum = tl.zeros([BLOCK], tl.float32)
    grad_sum = tl.zeros([BLOCK], tl.float32)
    for token in range(first, end):
        x = load_fp32(x_ptr + sample * x_stride_b + token * x_stride_n, columns, inside)
        grad = load_fp32(grad_ptr + sample * grad_stride_b + token * grad_stride_n, columns, inside)
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps)
        unit = x * rstd
        product_sum += grad * unit
        grad_sum += grad
        grad_x = norm_gradient(grad * factor, unit, rstd, dim)
        if residual_ptr is not None:
            residual_offset = sample * residual_stride_b + token * residual_stride_n
            grad_x += load_fp32(residual_ptr + residual_offset, columns, inside)
        offset = sample * out_stride_b + token * out_stride_n
        tl.store(grad_x_ptr + offset + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    parts = 2 if MODULATED else 1
    partial = partial_ptr + (sample * tl.num_programs(1) + group) * parts * dim + columns
    tl.store(partial, product_sum, mask=inside)
    if MODULATED:
        tl.store(partial + dim, grad_sum, mask=inside)


@triton.jit
def _residual_norm_modulate_forward(
    x_ptr, gate_ptr, y_ptr, weight_ptr, shift_ptr, scale_ptr, stream_ptr, out_ptr,
    tokens, dim, x_stride_b, x_stride_n, gate_stride_b, y_stride_b, y_stride_n, shift_stride_b, scale_stride_b,
    out_stride_b, out_stride_n, eps,
    CAST_FIRST: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``stream = x + gate * y``, and the modulated norm of what of it is stored."""
    sample, _, columns, inside, first, end = own_part(tokens, dim, TOKENS, BLOCK)
    weight = load_fp32(weight_ptr, columns, inside)
    gate = load_fp32(gate_ptr + sample * gate_stride_b, columns, inside)
    shift = load_fp32(shift_ptr + sample * shift_stride_b, columns, inside)
    scale = load_fp32(scale_ptr + sample * scale_stride_b, columns, inside)
    for token in range(first, end):
        x = load_fp32(x_ptr + sample * x_stride_b + token * x_stride_n, columns, inside)
        y = load_fp32(y_ptr + sample * y_stride_b + token * y_stride_n, columns, inside)
        stored = (x + gate * y).to(stream_ptr.dtype.element_ty)
        offset = sample * out_stride_b + token * out_stride_n
        tl.store(stream_ptr + offset + columns, stored, mask=inside)
        stream = stored.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(stream * stream, axis=0) / dim + eps)
        out = round_norm(stream, weight, rstd, stream_ptr.dtype.element_ty, CAST_FIRST) * (1.0 + scale) + shift
        tl.store(out_ptr + offset + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _residual_norm_modulate_backward(
    residual_ptr, grad_ptr, stream_ptr, gate_ptr, y_ptr, weight_ptr, scale_ptr, grad_x_ptr, grad_y_ptr,
    partial_ptr,
    tokens, dim, residual_stride_b, residual_stride_n, grad_stride_b, grad_stride_n,
    stream_stride_b, stream_stride_n, gate_stride_b, y_stride_b, y_stride_n, scale_stride_b,
    out_stride_b, out_stride_n, eps,
    CAST_FIRST: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of x and y, and the partial sums of ``grad * stream * rstd``, ``grad`` and ``grad_x * y``.

    ``residual`` is the gradient of the stream, ``grad`` that of the modulated norm.
    """
    sample, group, columns, inside, first, end = own_part(tokens, dim, TOKENS, BLOCK)
    factor = load_fp32(weight_ptr, columns, inside)
    if CAST_FIRST:
        factor = factor.to(stream_ptr.dtype.element_ty).to(tl.float32)
    factor = factor * (1.0 + load_fp32(scale_ptr + sample * scale_stride_b, columns, inside))
    gate = load_fp32(gate_ptr + sample * gate_stride_b, columns, inside)
    product_sum = tl.zeros([BLOCK], tl.float32)
    grad_sum = tl.zeros([BLOCK], tl.float32)
    gate_sum = tl.zeros([BLOCK], tl.float32)
    for token in range(first, end):
        stream = load_fp32(stream_ptr + sample * stream_stride_b + token * stream_stride_n, columns, inside)
        grad = load_fp32(grad_ptr + sample * grad_stride_b + token * grad_stride_n, columns, inside)
        rstd = tl.rsqrt(tl.sum(stream * stream, axis=0) / dim + eps)
        unit = stream * rstd
        product_sum += grad * unit
        grad_sum += grad
        residual_offset = sample * residual_stride_b + token * residual_stride_n
        grad_x = load_fp32(residual_ptr + residual_offset, columns, inside)
        grad_x += norm_gradient(grad * factor, unit, rstd, dim)
        y = load_fp32(y_ptr + sample * y_stride_b + token * y_stride_n, columns, inside)
        gate_sum += grad_x * y
        offset = sample * out_stride_b + token * out_stride_n
        tl.store(grad_x_ptr + offset + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_y_ptr + offset + columns, (grad_x * gate).to(grad_y_ptr.dtype.element_ty), mask=inside)
    partial = partial_ptr + (sample * tl.num_programs(1) + group) * 3 * dim + columns
    tl.store(partial, product_sum, mask=inside)
    tl.store(partial + dim, grad_sum, mask=inside)
    tl.store(partial + 2 * dim, gate_sum, mask=inside)


@triton.jit
def _gated_residual_forward(
    x_ptr, gate_ptr, y_ptr, out_ptr,
    tokens, dim, x_stride_b, x_stride_n, gate_stride_b, y_stride_b, y_stride_n, out_stride_b, out_stride_n,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, _, columns, inside, first, end = own_part(tokens, dim, TOKENS, BLOCK)
    gate = load_fp32(gate_ptr + sample * gate_stride_b, columns, inside)
    for token in range(first, end):
        x = load_fp32(x_ptr + sample * x_stride_b + token * x_stride_n, columns, inside)
        y = load_fp32(y_ptr + sample * y_stride_b + token * y_stride_n, columns, inside)
        out = x + gate * y
        offset = sample * out_stride_b + token * out_stride_n
        tl.store(out_ptr + offset + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_residual_backward(
    grad_ptr, gate_ptr, y_ptr, grad_y_ptr, partial_ptr,
    tokens, dim, grad_stride_b, grad_stride_n, gate_stride_b, y_stride_b, y_stride_n, out_stride_b, out_stride_n,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of y, and the partial sums of ``grad * y``."""
    sample, group, columns, inside, first, end = own_part(tokens, dim, TOKENS, BLOCK)
    gate = load_fp32(gate_ptr + sample * gate_stride_b, columns, inside)
    product_sum = tl.zeros([BLOCK], tl.float32)
    for token in range(first, end):
        grad = load_fp32(grad_ptr + sample * grad_stride_b + token * grad_stride_n, columns, inside)
        y = load_fp32(y_ptr + sample * y_stride_b + token * y_stride_n, columns, inside)
        product_sum += grad * y
        offset = sample * out_stride_b + token * out_stride_n
        tl.store(grad_y_ptr + offset + columns, (grad * gate).to(grad_y_ptr.dtype.element_ty), mask=inside)
    partial = partial_ptr + (sample * tl.num_programs(1) + group) * dim + columns
    tl.store(partial, product_sum, mask=inside)


@operator("deco_scale::norm_modulate")
def norm_modulate(
    x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, cast_first: bool
) -> Tensor:
    """RMSNorm of x (B, N, D); with shift and scale (B, 1, D), both or neither, modulated.

    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    check_rows(x, {"shift": shift, "scale": scale})
    if (shift is None) != (scale is None) or weight.shape != x.shape[2:]:
        raise ValueError(f"shift and scale come together, weight {tuple(weight.shape)} with x {tuple(x.shape)}")
    check_dtypes(weight=weight)
    batch, tokens, dim = x.shape
    out = empty_tokens(x, dtype=promoted(x, shift, scale))
    x, weight = rows(x), weight.contiguous()
    shift, scale = (None, None) if shift is None or scale is None else (rows(shift), rows(scale))
    _norm_modulate_forward[batch, triton.cdiv(tokens, FORWARD_TOKENS)](
        x, weight, shift, scale, out,
        tokens, dim, *x.stride()[:2], *(0 if t is None else t.stride(0) for t in (shift, scale)),
        *out.stride()[:2], eps,
        MODULATED=shift is not None, CAST_FIRST=cast_first, **tile(FORWARD_TOKENS, dim),
    )  # fmt: skip
    return out


@norm_modulate.register_fake
def _(x, weight, shift, scale, eps, cast_first):
    return empty_tokens(x, dtype=promoted(x, shift, scale))


@operator("deco_scale::norm_modulate_backward")
def norm_modulate_backward(
    grad: Tensor, residual: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor | None,
    eps: float, cast_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of x, and fp32 partial sums (B, G, 1 or 2, D) of ``grad * x / rms(x)`` and, scaled, ``grad``.

    ``residual`` is the gradient of x as the residual stream, which is added.
    """
    grad_x, partial = empty_tokens(x), partial_sums(x, 1 if scale is None else 2)
    grad, x, weight = rows(grad), rows(x), weight.contiguous()
    scale, residual = (None if t is None else rows(t) for t in (scale, residual))
    batch, groups, _, dim = partial.shape
    _norm_modulate_backward[batch, groups](
        grad, residual, x, weight, scale, grad_x, partial,
        x.shape[1], dim, *grad.stride()[:2], *((0, 0) if residual is None else residual.stride()[:2]),
        *x.stride()[:2], 0 if scale is None else scale.stride(0), *grad_x.stride()[:2], eps,
        MODULATED=scale is not None, CAST_FIRST=cast_first, **tile(BACKWARD_TOKENS, dim),
    )  # fmt: skip
    return grad_x, partial


@norm_modulate_backward.register_fake
def _(grad, residual, x, weight, scale, eps, cast_first):
    return empty_tokens(x), partial_sums(x, 1 if scale is None else 2)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, shift, scale, ctx.eps, ctx.cast_first = inputs
    # Of the shift only the dtype matters.
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(x, weight, scale)


def _norm_gradients(ctx: Any, grad: Tensor, residual: Tensor | None = None) -> tuple[Tensor | None, ...]:
    x, weight, scale = ctx.saved_tensors
    grad_x, partial = norm_modulate_backward(grad, residual, x, weight, scale, ctx.eps, ctx.cast_first)
    sums_BPD = partial.sum(1)
    if scale is None:
        return grad_x, sums_BPD.sum((0, 1)).to(weight.dtype), None, None, None, None
    return grad_x, *_affine_gradients(sums_BPD, x, weight, scale, ctx), None, None


def _affine_gradients(sums_BPD: Tensor, x: Tensor, weight: Tensor, scale: Tensor, ctx: Any) -> tuple[Tensor, ...]:
    """Gradients of weight, shift and scale, from the sums of ``grad * x / rms(x)`` and of ``grad``."""
    product_B1D, grad_B1D = sums_BPD.split(1, dim=1)
    factor = weight.to(x.dtype) if ctx.cast_first else weight
    grad_weight = (product_B1D * (1 + scale.float())).sum((0, 1)).to(weight.dtype)
    grad_scale = (product_B1D * factor.float()).to(scale.dtype)
    # Split's parts are views of one tensor; a gradient must be its own.
    return grad_weight, grad_B1D.to(ctx.shift_dtype, copy=True), grad_scale


norm_modulate.register_autograd(_norm_gradients, setup_context=_save_norm)


class _NormModulateWithResidual(torch.autograd.Function):
    """An operator's results are new tensors; here x passes through, so that its two gradients meet in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out = norm_modulate(x, *args)
        _save_norm(ctx, (x, *args), out)
        return x, out

    @staticmethod
    def backward(ctx: Any, residual: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _norm_gradients(ctx, grad, residual)


def norm_modulate_with_residual(
    x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """x, and its :func:`norm_modulate`; backward is one kernel that takes both gradients."""
    return _NormModulateWithResidual.apply(x, weight, shift, scale, eps, cast_first)  # type: ignore[no-any-return]


@operator("deco_scale::residual_norm_modulate")
def residual_norm_modulate(
    x: Tensor, gate: Tensor, y: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """``x + gate * y`` and its modulated RMSNorm, of x and y (B, N, D); gate, shift and scale are (B, 1, D).

    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    check_rows(x, {"gate": gate, "shift": shift, "scale": scale})
    check_dtypes(y=y, weight=weight)
    if y.shape != x.shape or weight.shape != x.shape[2:]:
        raise ValueError(f"y {tuple(y.shape)} or weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    batch, tokens, dim = x.shape
    stream, out = _streams(x, gate, y, shift, scale)
    x, gate, y, weight, shift, scale = rows(x), rows(gate), rows(y), weight.contiguous(), rows(shift), rows(scale)
    _residual_norm_modulate_forward[batch, triton.cdiv(tokens, FORWARD_TOKENS)](
        x, gate, y, weight, shift, scale, stream, out,
        tokens, dim, *x.stride()[:2], gate.stride(0), *y.stride()[:2], shift.stride(0), scale.stride(0),
        *out.stride()[:2], eps, CAST_FIRST=cast_first, **tile(FORWARD_TOKENS, dim),
    )  # fmt: skip
    return stream, out


def _streams(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    stream = empty_tokens(x, dtype=promoted(x, gate, y))
    return stream, empty_tokens(x, dtype=promoted(stream, shift, scale))


@residual_norm_modulate.register_fake
def _(x, gate, y, weight, shift, scale, eps, cast_first):
    return _streams(x, gate, y, shift, scale)


@operator("deco_scale::residual_norm_modulate_backward")
def residual_norm_modulate_backward(
    residual: Tensor, grad: Tensor, stream: Tensor, gate: Tensor, y: Tensor, weight: Tensor, scale: Tensor,
    eps: float, cast_first: bool, x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and y, and fp32 partial sums (B, G, 3, D): as those of the norm, and of ``grad_x * y``."""
    grad_x, grad_y, partial = _residual_gradient_outputs(stream, y, x_dtype)
    residual, grad, stream, gate, y = rows(residual), rows(grad), rows(stream), rows(gate), rows(y)
    weight, scale = weight.contiguous(), rows(scale)
    batch, groups, _, dim = partial.shape
    _residual_norm_modulate_backward[batch, groups](
        residual, grad, stream, gate, y, weight, scale, grad_x, grad_y, partial,
        y.shape[1], dim, *residual.stride()[:2], *grad.stride()[:2], *stream.stride()[:2], gate.stride(0),
        *y.stride()[:2], scale.stride(0), *grad_x.stride()[:2], eps,
        CAST_FIRST=cast_first, **tile(BACKWARD_TOKENS, dim),
    )  # fmt: skip
    return grad_x, grad_y, partial


def _residual_gradient_outputs(stream: Tensor, y: Tensor, x_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return empty_tokens(stream, dtype=x_dtype), empty_tokens(stream, dtype=y.dtype), partial_sums(stream, 3)


@residual_norm_modulate_backward.register_fake
def _(residual, grad, stream, gate, y, weight, scale, eps, cast_first, x_dtype):
    return _residual_gradient_outputs(stream, y, x_dtype)


def _save_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate, y, weight, shift, scale, ctx.eps, ctx.cast_first = inputs
    ctx.x_dtype, ctx.shift_dtype = x.dtype, shift.dtype
    ctx.save_for_backward(output[0], gate, y, weight, scale)


def _residual_norm_gradients(ctx: Any, residual: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    stream, gate, y, weight, scale = ctx.saved_tensors
    grad_x, grad_y, partial = residual_norm_modulate_backward(
        residual, grad, stream, gate, y, weight, scale, ctx.eps, ctx.cast_first, ctx.x_dtype
    )
    sums_BPD = partial.sum(1)
    affine = _affine_gradients(sums_BPD[:, :2], stream, weight, scale, ctx)
    return grad_x, sums_BPD[:, 2:].to(gate.dtype, copy=True), grad_y, *affine, None, None


residual_norm_modulate.register_autograd(_residual_norm_gradients, setup_context=_save_residual_norm)


@operator("deco_scale::gated_residual")
def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """``x + gate * y`` of x and y (B, N, D) and gate (B, 1, D).

    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    check_rows(x, {"gate": gate})
    check_dtypes(y=y)
    if y.shape != x.shape:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} differ in shape")
    batch, tokens, dim = x.shape
    out = empty_tokens(x, dtype=promoted(x, gate, y))
    x, gate, y = rows(x), rows(gate), rows(y)
    _gated_residual_forward[batch, triton.cdiv(tokens, FORWARD_TOKENS)](
        x, gate, y, out,
        tokens, dim, *x.stride()[:2], gate.stride(0), *y.stride()[:2], *out.stride()[:2],
        **tile(FORWARD_TOKENS, dim),
    )  # fmt: skip
    return out


@gated_residual.register_fake
def _(x, gate, y):
    return empty_tokens(x, dtype=promoted(x, gate, y))


@operator("deco_scale::gated_residual_backward")
def gated_residual_backward(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of y, and fp32 partial sums (B, G, D) of ``grad * y``."""
    grad_y, partial = empty_tokens(y), partial_sums(y)
    grad, gate, y = rows(grad), rows(gate), rows(y)
    batch, groups, dim = partial.shape
    _gated_residual_backward[batch, groups](
        grad, gate, y, grad_y, partial,
        y.shape[1], dim, *grad.stride()[:2], gate.stride(0), *y.stride()[:2], *grad_y.stride()[:2],
        **tile(BACKWARD_TOKENS, dim),
    )  # fmt: skip
    return grad_y, partial


@gated_residual_backward.register_fake
def _(grad, gate, y):
    return empty_tokens(y), partial_sums(y)


def _save_residual(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, gate, y = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(gate, y)


def _residual_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, y = ctx.saved_tensors
    grad_y, partial = gated_residual_backward(grad, gate, y)
    return grad.to(ctx.x_dtype), partial.sum(1, keepdim=True).to(gate.dtype), grad_y


gated_residual.register_autograd(_residual_gradients, setup_context=_save_residual)

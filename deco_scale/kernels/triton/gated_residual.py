"""Triton kernels of the gated residual, walking over tokens as those of the norm do. Not yet run on a GPU.

Shape letters: B batch, N tokens, D model width, G groups of tokens (one program each) of a sample.
"""
# mypy: allow-untyped-defs
# The arguments of kernels have no Python type.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deco_scale.kernels.triton.norm_modulate import (
    BACKWARD_TOKENS,
    FORWARD_TOKENS,
    check_dtypes,
    check_rows,
    load_fp32,
    num_warps,
    own_part,
    promoted,
    rows,
)


@triton.jit
def _gated_residual_forward(
    x_ptr,
    gate_ptr,
    y_ptr,
    out_ptr,
    tokens,
    dim,
    x_stride_b,
    x_stride_n,
    gate_stride_b,
    y_stride_b,
    y_stride_n,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, _, columns, inside, first, end = own_part(tokens, dim, TOKENS, BLOCK)
    gate = load_fp32(gate_ptr + sample * gate_stride_b, columns, inside)
    for token in range(first, end):
        x = load_fp32(x_ptr + sample * x_stride_b + token * x_stride_n, columns, inside)
        y = load_fp32(y_ptr + sample * y_stride_b + token * y_stride_n, columns, inside)
        out = x + gate * y
        offset = (sample * tokens + token) * dim
        tl.store(out_ptr + offset + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_residual_backward(
    grad_ptr,
    gate_ptr,
    y_ptr,
    grad_y_ptr,
    partial_ptr,
    tokens,
    dim,
    grad_stride_b,
    grad_stride_n,
    gate_stride_b,
    y_stride_b,
    y_stride_n,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of y, and the partial sums of ``grad * y``."""
    sample, group, columns, inside, first, end = own_part(tokens, dim, TOKENS, BLOCK)
    gate = load_fp32(gate_ptr + sample * gate_stride_b, columns, inside)
    product_sum = tl.zeros([BLOCK], tl.float32)
    for token in range(first, end):
        grad = load_fp32(grad_ptr + sample * grad_stride_b + token * grad_stride_n, columns, inside)
        y = load_fp32(y_ptr + sample * y_stride_b + token * y_stride_n, columns, inside)
        product_sum += grad * y
        offset = (sample * tokens + token) * dim
        tl.store(grad_y_ptr + offset + columns, (grad * gate).to(grad_y_ptr.dtype.element_ty), mask=inside)
    partial = partial_ptr + (sample * tl.num_programs(1) + group) * dim + columns
    tl.store(partial, product_sum, mask=inside)


@torch.library.custom_op("deco_scale::gated_residual", mutates_args=())
def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """``x + gate * y`` of x and y (B, N, D) and gate (B, 1, D).

    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    check_rows(x, {"gate": gate})
    check_dtypes(y=y)
    if y.shape != x.shape:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} differ in shape")
    batch, tokens, dim = x.shape
    out = x.new_empty(x.shape, dtype=promoted(x, gate, y))
    x, gate, y = rows(x), rows(gate), rows(y)
    block = triton.next_power_of_2(dim)
    _gated_residual_forward[batch, triton.cdiv(tokens, FORWARD_TOKENS)](
        x,
        gate,
        y,
        out,
        tokens,
        dim,
        x.stride(0),
        x.stride(1),
        gate.stride(0),
        y.stride(0),
        y.stride(1),
        TOKENS=FORWARD_TOKENS,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return out


@gated_residual.register_fake
def _(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=promoted(x, gate, y))


@torch.library.custom_op("deco_scale::gated_residual_backward", mutates_args=())
def gated_residual_backward(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of y, and fp32 partial sums (B, G, D) of ``grad * y``."""
    batch, tokens, dim = y.shape
    grad, gate, y = rows(grad), rows(gate), rows(y)
    grad_y = y.new_empty(y.shape)
    groups = triton.cdiv(tokens, BACKWARD_TOKENS)
    partial = y.new_empty((batch, groups, dim), dtype=torch.float32)
    block = triton.next_power_of_2(dim)
    _gated_residual_backward[batch, groups](
        grad,
        gate,
        y,
        grad_y,
        partial,
        tokens,
        dim,
        grad.stride(0),
        grad.stride(1),
        gate.stride(0),
        y.stride(0),
        y.stride(1),
        TOKENS=BACKWARD_TOKENS,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return grad_y, partial


@gated_residual_backward.register_fake
def _(grad: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    groups = (y.shape[1] + BACKWARD_TOKENS - 1) // BACKWARD_TOKENS
    partial = y.new_empty((y.shape[0], groups, y.shape[2]), dtype=torch.float32)
    return y.new_empty(y.shape), partial


def _save_residual(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, gate, y = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(gate, y)


def _residual_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, y = ctx.saved_tensors
    grad_y, partial = torch.ops.deco_scale.gated_residual_backward(grad, gate, y)
    return grad.to(ctx.x_dtype), partial.sum(1, keepdim=True).to(gate.dtype), grad_y


gated_residual.register_autograd(_residual_gradients, setup_context=_save_residual)

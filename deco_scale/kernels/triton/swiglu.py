"""Triton kernels of SwiGLU's activation. Not yet run on a GPU.

The twin is :func:`deco_scale.kernels.swiglu.swiglu`. Both gradients are written into one tensor, that of the
linear's output: 3 values a hidden unit are moved forward and 5 backward, and only the input is kept.
"""
# mypy: allow-untyped-defs
# The arguments of kernels have no Python type; rules for shapes repeat the operators' arguments.

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from deco_scale.kernels.triton.operators import operator
from deco_scale.kernels.triton.token_rows import check_dtypes, load_fp32

UNITS = 1024
WARPS = 4
"""Hidden units of a program: eight values of gate and of up a thread. Not yet tuned."""


@triton.jit
def _own_part(units, UNITS: tl.constexpr):
    """The program's row, its units in it, and which of them exist."""
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    return tl.program_id(0).to(tl.int64), unit, unit < units


@triton.jit
def _swiglu_forward(gate_up_ptr, out_ptr, units, UNITS: tl.constexpr):
    row, unit, inside = _own_part(units, UNITS)
    gate = load_fp32(gate_up_ptr + row * 2 * units, unit, inside)
    up = load_fp32(gate_up_ptr + row * 2 * units + units, unit, inside)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * units + unit, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(grad_ptr, gate_up_ptr, grad_gate_up_ptr, units, UNITS: tl.constexpr):
    row, unit, inside = _own_part(units, UNITS)
    grad = load_fp32(grad_ptr + row * units, unit, inside)
    gate = load_fp32(gate_up_ptr + row * 2 * units, unit, inside)
    up = load_fp32(gate_up_ptr + row * 2 * units + units, unit, inside)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = grad * gate * sigmoid
    dtype = grad_gate_up_ptr.dtype.element_ty
    tl.store(grad_gate_up_ptr + row * 2 * units + unit, grad_gate.to(dtype), mask=inside)
    tl.store(grad_gate_up_ptr + row * 2 * units + units + unit, grad_up.to(dtype), mask=inside)


@operator("deco_scale::swiglu")
def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` (..., H) of the halves of (..., 2H); ``ValueError`` unless in fp32, bf16 or fp16."""
    check_dtypes(gate_up=gate_up)
    out = _output(gate_up)
    if out.numel():
        _swiglu_forward[_grid(out)](
            gate_up.contiguous(), out, out.shape[-1], UNITS=UNITS, num_warps=WARPS
        )  # fmt: skip
    return out


@swiglu.register_fake
def _(gate_up):
    return _output(gate_up)


@operator("deco_scale::swiglu_backward")
def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of both halves, dense."""
    grad_gate_up = gate_up.new_empty(gate_up.shape)
    if grad.numel():
        _swiglu_backward[_grid(grad)](
            grad.contiguous(), gate_up.contiguous(), grad_gate_up, grad.shape[-1], UNITS=UNITS, num_warps=WARPS
        )  # fmt: skip
    return grad_gate_up


@swiglu_backward.register_fake
def _(grad, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _output(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _grid(out: Tensor) -> tuple[int, int]:
    units = out.shape[-1]
    return out.numel() // units, triton.cdiv(units, UNITS)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    return (swiglu_backward(grad, *ctx.saved_tensors),)


swiglu.register_autograd(_gradients, setup_context=_save)

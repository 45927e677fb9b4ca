"""Triton kernels of RMSNorm with AdaLN modulation, and what the kernels over tokens share. Not yet run on a GPU.

The twins and the facts about rounding are in :mod:`deco_scale.kernels.norm`. Every program walks over a few
tokens of one sample, so that what is the same for all tokens (weight, shift, scale, gate) is read once per
program, and sums over tokens (their gradients) are carried in registers. Each program writes its own partial
sums and torch adds them up: the result does not depend on the order in which programs run. The root mean square
is computed again in backward: the row is read there anyway, so keeping it would save nothing.

Shape letters: B batch, N tokens, D model width, G groups of tokens (one program each) of a sample.
"""
# mypy: allow-untyped-defs
# The arguments of kernels have no Python type.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_TOKENS = 4
BACKWARD_TOKENS = 16
"""Tokens of a program. Backward's partial sums take 2 / 16 of the bytes of one fp32 activation; not yet tuned."""

MAX_ROW = 16384
"""Values of a row, padded to a power of two: twice as many spill 4.6 KB a thread (Triton 3.9 for sm_90)."""
MAX_TOKENS = 65535 * FORWARD_TOKENS
"""Of a sample: groups of tokens are the second dimension of a CUDA grid."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def own_part(tokens, dim, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's sample and group, a row's columns and which of them exist, the first token and their end."""
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    first, end = group * TOKENS, tl.minimum((group + 1) * TOKENS, tokens)
    return sample, group, columns, columns < dim, first, end


@triton.jit
def load_fp32(pointer, offsets, inside):
    """The values at ``offsets`` from the pointer in fp32, zero where not ``inside``."""
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def round_norm(x, weight, rstd, rounded: tl.constexpr, CAST_FIRST: tl.constexpr):
    """The norm, rounded to the type ``rounded`` as the twin does; all other arguments and the result are fp32."""
    if CAST_FIRST:
        # A product of two bf16 numbers is exact in fp32.
        product = weight.to(rounded).to(tl.float32) * (x * rstd).to(rounded).to(tl.float32)
    else:
        product = weight * (x * rstd)
    return product.to(rounded).to(tl.float32)


@triton.jit
def _norm_modulate_forward(
    x_ptr,
    weight_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    tokens,
    dim,
    x_stride_b,
    x_stride_n,
    shift_stride_b,
    scale_stride_b,
    eps,
    MODULATED: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
        out_offset = (sample * tokens + token) * dim
        tl.store(out_ptr + out_offset + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_modulate_backward(
    grad_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    grad_x_ptr,
    partial_ptr,
    tokens,
    dim,
    grad_stride_b,
    grad_stride_n,
    x_stride_b,
    x_stride_n,
    scale_stride_b,
    eps,
    MODULATED: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of x, and the partial sums of ``grad * x * rstd`` and, if modulated, of ``grad``."""
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
        grad_unit = grad * factor
        grad_x = rstd * (grad_unit - unit * (tl.sum(grad_unit * unit, axis=0) / dim))
        offset = (sample * tokens + token) * dim
        tl.store(grad_x_ptr + offset + columns, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    parts = 2 if MODULATED else 1
    partial = partial_ptr + (sample * tl.num_programs(1) + group) * parts * dim + columns
    tl.store(partial, product_sum, mask=inside)
    if MODULATED:
        tl.store(partial + dim, grad_sum, mask=inside)


def rows(x: Tensor) -> Tensor:
    """``x`` itself where its last dimension is dense, otherwise a copy: kernels take any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` for a tensor that the kernels would not compute in its own precision."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; the Triton kernels take {DTYPES}")


def check_rows(x_BND: Tensor, per_sample: dict[str, Tensor | None]) -> None:
    """Raise ``ValueError`` unless x is (B, N, D) and the others (B, 1, D), as kernels take them."""
    if x_BND.ndim != 3:
        raise ValueError(f"x must be (B, N, D), not {tuple(x_BND.shape)}")
    expected = (x_BND.shape[0], 1, x_BND.shape[2])
    for name, tensor in per_sample.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must be {expected} for x {tuple(x_BND.shape)}, not {tuple(tensor.shape)}")
    _, tokens, dim = x_BND.shape
    if dim > MAX_ROW or tokens > MAX_TOKENS:
        raise ValueError(
            f"the Triton kernels take up to {MAX_TOKENS} tokens of width {MAX_ROW}, not {tokens} of {dim}; "
            "use kernels=torch"
        )
    check_dtypes(x=x_BND, **per_sample)


def num_warps(block: int) -> int:
    """About eight values of a row per thread, so that bf16 rows are read 16 bytes at a time."""
    return max(1, min(8, block // 256))


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The type that an operation of torch on all of these would have."""
    dtype, *others = [t.dtype for t in tensors if t is not None]
    for other in others:
        dtype = torch.promote_types(dtype, other)
    return dtype


@torch.library.custom_op("deco_scale::norm_modulate", mutates_args=())
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
    out = x.new_empty(x.shape, dtype=promoted(x, shift, scale))
    x, weight = rows(x), weight.contiguous()
    shift, scale = (None, None) if shift is None or scale is None else (rows(shift), rows(scale))
    block = triton.next_power_of_2(dim)
    _norm_modulate_forward[batch, triton.cdiv(tokens, FORWARD_TOKENS)](
        x,
        weight,
        shift,
        scale,
        out,
        tokens,
        dim,
        x.stride(0),
        x.stride(1),
        0 if shift is None else shift.stride(0),
        0 if scale is None else scale.stride(0),
        eps,
        MODULATED=shift is not None,
        CAST_FIRST=cast_first,
        TOKENS=FORWARD_TOKENS,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return out


@norm_modulate.register_fake
def _(
    x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float, cast_first: bool
) -> Tensor:
    return x.new_empty(x.shape, dtype=promoted(x, shift, scale))


@torch.library.custom_op("deco_scale::norm_modulate_backward", mutates_args=())
def norm_modulate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and fp32 partial sums (B, G, 1 or 2, D) of ``grad * x / rms(x)`` and, scaled, ``grad``."""
    batch, tokens, dim = x.shape
    grad, x, weight = rows(grad), rows(x), weight.contiguous()
    scale = None if scale is None else rows(scale)
    grad_x = x.new_empty(x.shape)
    groups = triton.cdiv(tokens, BACKWARD_TOKENS)
    partial = x.new_empty((batch, groups, 1 if scale is None else 2, dim), dtype=torch.float32)
    block = triton.next_power_of_2(dim)
    _norm_modulate_backward[batch, groups](
        grad,
        x,
        weight,
        scale,
        grad_x,
        partial,
        tokens,
        dim,
        grad.stride(0),
        grad.stride(1),
        x.stride(0),
        x.stride(1),
        0 if scale is None else scale.stride(0),
        eps,
        MODULATED=scale is not None,
        CAST_FIRST=cast_first,
        TOKENS=BACKWARD_TOKENS,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return grad_x, partial


@norm_modulate_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    groups = (x.shape[1] + BACKWARD_TOKENS - 1) // BACKWARD_TOKENS
    parts = 1 if scale is None else 2
    partial = x.new_empty((x.shape[0], groups, parts, x.shape[2]), dtype=torch.float32)
    return x.new_empty(x.shape), partial


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, shift, scale, ctx.eps, ctx.cast_first = inputs
    # Of the shift only the dtype matters.
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(x, weight, scale)


def _norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale = ctx.saved_tensors
    grad_x, partial = torch.ops.deco_scale.norm_modulate_backward(grad, x, weight, scale, ctx.eps, ctx.cast_first)
    sums_BPD = partial.sum(1)
    if scale is None:
        return grad_x, sums_BPD.sum((0, 1)).to(weight.dtype), None, None, None, None
    product_B1D, grad_B1D = sums_BPD.split(1, dim=1)
    factor = weight.to(x.dtype) if ctx.cast_first else weight
    grad_weight = (product_B1D * (1 + scale.float())).sum((0, 1)).to(weight.dtype)
    grad_scale = (product_B1D * factor.float()).to(scale.dtype)
    # Split's parts are views of one tensor; a gradient must be its own.
    grad_shift = grad_B1D.to(ctx.shift_dtype, copy=True)
    return grad_x, grad_weight, grad_shift, grad_scale, None, None


norm_modulate.register_autograd(_norm_gradients, setup_context=_save_norm)

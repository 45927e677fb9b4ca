"""Triton kernels of the flow and the frequency loss in one pass over prediction and target. Not yet run on a GPU.

The twins are ``flow_loss`` and ``frequency_loss`` of :mod:`deco_scale.objectives`. Both losses are quadratic in
the error e of the velocity: the sum of e^2, and the sum of w (K e)^2 with K the colour transform and the DCT of
an 8 x 8 block. So the gradient, 2 (a e + b K' w K e) for upstream gradients a and b, is written in one pass too,
and nothing is kept but the inputs. The DCT of a block is a product with a 64 x 64 matrix. Plain fp32 products of
that size would spill registers (seen when compiled for sm_90), so tensor cores take them as three products of TF32
parts, which keeps nearly all digits of fp32.

Shape letters: M patches, K values of a patch (channel-major), R blocks of a program, J pixels or frequencies of a
block, G programs.
"""
# mypy: allow-untyped-defs
# The arguments of kernels have no Python type; rules for shapes repeat the operators' arguments.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deco_scale.kernels.triton.operators import operator
from deco_scale.kernels.triton.token_rows import check_dtypes, load_fp32

SIDE = 8
BLOCKS = 16
WARPS = 4
"""16 is the minimum for tensor cores; more would spill registers. Not yet tuned."""


@triton.jit
def _offsets(blocks, patch_size, R: tl.constexpr, SIDE: tl.constexpr):
    """Where the red pixels of the program's blocks are, (R, 64), and which blocks exist."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    pixel = tl.arange(0, SIDE * SIDE)
    side = patch_size // SIDE
    patch, place = row // (side * side), row % (side * side)
    corner = (place // side) * SIDE * patch_size + (place % side) * SIDE
    start = patch.to(tl.int64) * (3 * patch_size * patch_size) + corner
    within = (pixel // SIDE) * patch_size + pixel % SIDE
    return start[:, None] + within[None, :], (row < blocks)[:, None] & (pixel >= 0)[None, :]


@triton.jit
def _error(prediction_ptr, target_ptr, offsets, mask):
    return load_fp32(prediction_ptr, offsets, mask) - load_fp32(target_ptr, offsets, mask)


@triton.jit
def _errors(prediction_ptr, target_ptr, offsets, mask, plane):
    """The errors (R, J) in red, green and blue, which lie ``plane`` values apart."""
    red = _error(prediction_ptr, target_ptr, offsets, mask)
    green = _error(prediction_ptr, target_ptr, offsets + plane, mask)
    blue = _error(prediction_ptr, target_ptr, offsets + 2 * plane, mask)
    return red, green, blue


@triton.jit
def _coefficients(colours_ptr, channel, red, green, blue, transposed):
    """The blocks' coefficients (R, J) in a channel of YCbCr: a row's pixels times the transposed transform."""
    row_ptr = colours_ptr + 3 * channel
    mixed = tl.load(row_ptr) * red + tl.load(row_ptr + 1) * green + tl.load(row_ptr + 2) * blue
    return tl.dot(mixed, transposed, input_precision="tf32x3")


@triton.jit
def _forward(
    prediction_ptr, target_ptr, transform_ptr, colours_ptr, weights_ptr, partial_ptr,
    blocks, patch_size, R: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = SIDE * SIDE
    offsets, mask = _offsets(blocks, patch_size, R, SIDE)
    plane = patch_size * patch_size
    red, green, blue = _errors(prediction_ptr, target_ptr, offsets, mask, plane)
    pixel = tl.arange(0, J)
    transposed = tl.load(transform_ptr + pixel[None, :] * J + pixel[:, None])
    flow = red * red + green * green + blue * blue
    frequency = tl.zeros([R, J], tl.float32)
    for channel in tl.static_range(3):
        coefficients = _coefficients(colours_ptr, channel, red, green, blue, transposed)
        weight = tl.load(weights_ptr + channel * J + pixel)[None, :]
        frequency += weight * coefficients * coefficients
    program = tl.program_id(0)
    tl.store(partial_ptr + 2 * program, tl.sum(tl.sum(flow, axis=1), axis=0))
    tl.store(partial_ptr + 2 * program + 1, tl.sum(tl.sum(frequency, axis=1), axis=0))


@triton.jit
def _backward(
    upstream_ptr, prediction_ptr, target_ptr, transform_ptr, colours_ptr, weights_ptr, grad_ptr,
    blocks, patch_size, R: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = SIDE * SIDE
    offsets, mask = _offsets(blocks, patch_size, R, SIDE)
    plane = patch_size * patch_size
    red, green, blue = _errors(prediction_ptr, target_ptr, offsets, mask, plane)
    of_flow, of_frequency = 2.0 * tl.load(upstream_ptr), 2.0 * tl.load(upstream_ptr + 1)
    pixel = tl.arange(0, J)
    transform = tl.load(transform_ptr + pixel[:, None] * J + pixel[None, :])
    transposed = tl.load(transform_ptr + pixel[None, :] * J + pixel[:, None])
    grad_red, grad_green, grad_blue = of_flow * red, of_flow * green, of_flow * blue
    for channel in tl.static_range(3):
        coefficients = _coefficients(colours_ptr, channel, red, green, blue, transposed)
        weight = tl.load(weights_ptr + channel * J + pixel)[None, :]
        back = of_frequency * tl.dot(weight * coefficients, transform, input_precision="tf32x3")
        grad_red += tl.load(colours_ptr + 3 * channel) * back
        grad_green += tl.load(colours_ptr + 3 * channel + 1) * back
        grad_blue += tl.load(colours_ptr + 3 * channel + 2) * back
    tl.store(grad_ptr + offsets, grad_red.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_ptr + offsets + plane, grad_green.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_ptr + offsets + 2 * plane, grad_blue.to(grad_ptr.dtype.element_ty), mask=mask)


@operator("deco_scale::squared_error_sums")
def squared_error_sums(
    prediction: Tensor, target: Tensor, transform: Tensor, colours: Tensor, weights: Tensor, patch_size: int
) -> Tensor:
    """Sums (2) of the squared error and of its weighted squared coefficients, in fp32.

    See :func:`flow_and_frequency`. Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    values = 3 * patch_size * patch_size
    if prediction.shape != target.shape or prediction.shape[-1] != values or patch_size % SIDE:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape, "
            f"RGB patches of {patch_size} pixels a side, a multiple of {SIDE}"
        )
    sizes = {"transform": (transform, 4096), "colours": (colours, 9), "weights": (weights, 192)}
    for name, (table, count) in sizes.items():
        if table.numel() != count or table.dtype != torch.float32:
            raise ValueError(f"{name} must have {count} values in float32, not {tuple(table.shape)} {table.dtype}")
    check_dtypes(prediction=prediction, target=target)
    blocks = prediction.numel() // (3 * SIDE * SIDE)
    programs = triton.cdiv(blocks, BLOCKS)
    partial = prediction.new_empty((programs, 2), dtype=torch.float32)
    inputs = [t.contiguous() for t in (prediction, target, transform, colours, weights)]
    _forward[(programs,)](*inputs, partial, blocks, patch_size, R=BLOCKS, SIDE=SIDE, num_warps=WARPS)
    return partial.sum(0)


@squared_error_sums.register_fake
def _(prediction, target, transform, colours, weights, patch_size):
    return prediction.new_empty(2, dtype=torch.float32)


@operator("deco_scale::squared_error_gradient")
def squared_error_gradient(
    upstream: Tensor, prediction: Tensor, target: Tensor, transform: Tensor, colours: Tensor, weights: Tensor,
    patch_size: int,
) -> Tensor:  # fmt: skip
    """Gradient of the prediction for upstream gradients (2) of the two sums."""
    blocks = prediction.numel() // (3 * SIDE * SIDE)
    programs = triton.cdiv(blocks, BLOCKS)
    grad = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    inputs = [t.contiguous() for t in (upstream, prediction, target, transform, colours, weights)]
    _backward[(programs,)](*inputs, grad, blocks, patch_size, R=BLOCKS, SIDE=SIDE, num_warps=WARPS)
    return grad


@squared_error_gradient.register_fake
def _(upstream, prediction, target, transform, colours, weights, patch_size):
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.patch_size = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grad_prediction = squared_error_gradient(grad, *tensors, ctx.patch_size)
    return grad_prediction, None, None, None, None, None


squared_error_sums.register_autograd(_gradients, setup_context=_save)


def flow_and_frequency(
    prediction: Tensor, target: Tensor, transform: Tensor, colours: Tensor, weights: Tensor, patch_size: int
) -> tuple[Tensor, Tensor]:
    """Flow and frequency loss, fp32 means over the values of prediction and target (..., 3 * patch_size^2).

    ``transform`` (64, 64) is a block's DCT, ``colours`` (3, 3) leads from RGB to YCbCr, ``weights`` (3, 8, 8) are
    those of the frequencies. Only the prediction gets a gradient.
    """
    flow, frequency = squared_error_sums(prediction, target, transform, colours, weights, patch_size).unbind()
    return flow / prediction.numel(), frequency / prediction.numel()

"""The per-pixel MLP of the pixel decoder as Triton kernels: one forward, one backward that computes it again.

They are operators of their own (``deco_scale::render_pixels`` and its backward), opaque to compilation and to
activation checkpointing, with a shape rule and a derivative. Only inputs are kept for backward.

Shape letters: M patches, P pixels of a patch, C channels, K = C * P values of a patch, W decoder width, L weights.
"""
# mypy: allow-untyped-defs
# Rules for shapes repeat the operators' arguments without their types.

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from deco_scale.kernels.pixel_decoder import DecoderWeights
from deco_scale.kernels.triton.operators import operator
from deco_scale.kernels.triton.pixel_decoder_device import backward_kernel, forward_kernel

DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETER_PROGRAMS = 3
"""Programs on a CPU, where they run one after the other: enough to test the sums over programs."""
NUM_WARPS = 8
NUM_STAGES = 1
"""No prefetching of loads, because there are no registers left."""
FORWARD_TILE = 128
BACKWARD_TILE = {16: 128, 32: 128, 64: 32}
"""Pixels of a tile (backward: by padded width), for products of 16-bit operands. Not yet tuned on a GPU."""
FORWARD_TILE_FP32, BACKWARD_TILE_FP32 = 32, 16
"""Full fp32 has no tensor cores: a product is unrolled into registers, which larger tiles overflow."""
BACKWARD_CHUNK = 1 << 17
"""Pixels whose gradients pass between the blocks in memory: at width 32, 32 MiB, which an H100's L2 holds."""
MAX_WIDTH = 64


def render_patches(patches_MK: Tensor, condition_MPW: Tensor, weights: DecoderWeights, eps: float) -> Tensor:
    """Output ``(M, K)``, channel-major like the patches; ``eps`` is that of the layer norms.

    Matrix products take autocast's type where it is on, else the inputs'; the output has that type. Sums, norms,
    the residual stream and the gradients between products are fp32. Raises ``ValueError`` for other types than
    fp32, bf16 and fp16, for inputs of different types without autocast, for a width above 64, where the GPU has
    too little shared memory, and for tensors on a device that Triton does not compute on.
    """
    folded_weight, folded_constant, blocks, head_weight, head_bias = weights
    device, width = patches_MK.device, condition_MPW.shape[-1]
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else condition_MPW.dtype
    given = {patches_MK.dtype, condition_MPW.dtype, folded_weight.dtype, head_weight.dtype}
    if dtype not in DOT_TYPES or not given <= set(DOT_TYPES) or (not autocast and len(given) > 1):
        raise ValueError(f"pixel decoder kernel got types {sorted(map(str, given))}, computing in {dtype}")
    if width > MAX_WIDTH:
        raise ValueError(f"decoder width {width} is above {MAX_WIDTH}, the widest of the Triton kernel; use torch")
    matrices = [w for b in blocks for w in (b.modulation_weight, b.first_weight, b.last_weight)]
    vectors = [
        v for b in blocks for v in (b.norm_weight, b.norm_bias, b.first_bias, b.last_bias, b.modulation_bias)
    ]
    parts = (*matrices, *vectors, folded_weight.t(), head_weight, head_bias)
    weights_L = torch.cat([part.flatten() for part in parts])
    inputs = [tensor.contiguous() for tensor in (patches_MK, condition_MPW, folded_constant)]
    return _render(*inputs, weights_L, len(blocks), eps, dtype)


@operator("deco_scale::render_pixels")
def _render(
    patches_MK: Tensor, condition_MPW: Tensor, constant_PW: Tensor, weights_L: Tensor,
    num_blocks: int, eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    device = patches_MK.device
    if device.type == "cpu" and isinstance(forward_kernel, triton.runtime.JITFunction):
        raise ValueError(f"Triton computes on a GPU, the pixels are on {device}; use kernels=torch")
    out_MK = torch.empty_like(patches_MK, dtype=dtype)
    constants = _constants(patches_MK, condition_MPW, num_blocks, dtype)
    tile = FORWARD_TILE_FP32 if dtype == torch.float32 else FORWARD_TILE
    rows = condition_MPW.shape[0] * condition_MPW.shape[1]
    if rows:
        # Two to a multiprocessor: one loads while the other computes. Not yet run on a GPU.
        programs = min(math.ceil(rows / tile), 2 * _processors(device))
        with _refuse_too_large(constants["W"], dtype):
            forward_kernel[(programs,)](
                patches_MK, condition_MPW, constant_PW, weights_L, out_MK, rows, eps, **constants, T=tile,
                num_warps=NUM_WARPS, num_stages=NUM_STAGES,
            )  # fmt: skip
    return out_MK


@operator("deco_scale::render_pixels_backward")
def _render_backward(
    grad_MK: Tensor, patches_MK: Tensor, condition_MPW: Tensor, constant_PW: Tensor, weights_L: Tensor,
    num_blocks: int, eps: float, with_patches: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of patches (empty unless ``with_patches``), condition, constant and weights."""
    grad_MK = grad_MK.contiguous()
    (_, num_pixels, width), device = condition_MPW.shape, patches_MK.device
    constants = _constants(patches_MK, condition_MPW, num_blocks, grad_MK.dtype)
    tile = BACKWARD_TILE_FP32 if grad_MK.dtype == torch.float32 else BACKWARD_TILE[constants["V"]]
    channels, folded = constants["C"], weights_L[-(2 * width + 1) * constants["C"] :][: width * constants["C"]]
    chunk = max(1, BACKWARD_CHUNK // num_pixels)
    most_rows = min(len(patches_MK), chunk) * num_pixels
    programs = max(1, min(math.ceil(most_rows / tile), _processors(device)))
    grad_patches = torch.empty_like(patches_MK) if with_patches else patches_MK.new_empty(0)
    grad_condition = torch.empty_like(condition_MPW)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}
    between = torch.empty(2, most_rows, width, **fp32)
    block_sums = torch.zeros(programs, num_blocks, 5, width, width, **fp32)
    tile_sums = torch.empty(math.ceil(most_rows / tile), 5 + channels, width, **fp32)
    vector_sums = torch.zeros(num_blocks, 5 + channels, width, **fp32)
    grad_constant = torch.zeros(num_pixels, width, **fp32)
    grad_folded = torch.zeros(channels, width, **fp32)
    for first in range(0, len(patches_MK), chunk):
        patches, condition, grad, grad_of_condition = (
            t[first : first + chunk] for t in (patches_MK, condition_MPW, grad_MK, grad_condition)
        )
        for index in reversed(range(num_blocks)):
            with _refuse_too_large(width, grad_MK.dtype):
                backward_kernel[(programs,)](
                    patches, condition, constant_PW, weights_L, grad, grad_of_condition, *between, block_sums,
                    tile_sums, len(patches) * num_pixels, index, eps, **constants, T=tile, FIRST=index == 0,
                    LAST=index == num_blocks - 1, num_warps=NUM_WARPS, num_stages=NUM_STAGES,
                )  # fmt: skip
            vector_sums[index] += tile_sums[: math.ceil(len(patches) * num_pixels / tile)].sum(0)
        embedded_MPW = between[0, : len(patches) * num_pixels].view(-1, num_pixels, width)
        grad_constant += embedded_MPW.sum(0)
        grad_folded += torch.einsum("mcp,mpw->cw", patches.view(-1, channels, num_pixels).float(), embedded_MPW)
        if with_patches:
            pixels_MPC = embedded_MPW @ folded.view(channels, width).t().float()
            grad_patches[first : first + chunk] = pixels_MPC.transpose(1, 2).flatten(1)
    grad_bias = grad_MK.view(-1, channels, num_pixels).sum((0, 2), dtype=torch.float32)
    ends = (grad_folded, vector_sums[-1, 5:], grad_bias)
    grad_weights = _weight_gradients(block_sums.sum(0), vector_sums[:, :5], ends, weights_L, grad_MK.dtype)
    return grad_patches, grad_condition, grad_constant.to(constant_PW.dtype), grad_weights


def _weight_gradients(
    matrices: Tensor, vectors: Tensor, ends: Sequence[Tensor], weights_L: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient of all weights, from the blocks' sums as the kernel orders them, (5, W, W) and (5, W) of each.

    With g the gradient of ``normal * weight + bias`` times ``1 + scale``, plus shift, and n the norm: the sums are
    of g and g n, each times the condition c and alone. Those of ``g (n * weight + bias)`` (the scale's) and of
    ``g n (1 + scale)`` and ``g (1 + scale)`` (the norm's) follow from them, as scale is linear in c.
    """
    blocks, width = len(matrices), matrices.shape[-1]
    shift, normal, gate, first, last = matrices.unbind(1)
    of_shift, of_normal, of_gate, of_first, of_last = vectors.unbind(1)
    given, given_vectors, _ = weights_L.float().split(
        [blocks * 5 * width**2, blocks * 7 * width, len(weights_L) - blocks * (5 * width + 7) * width]
    )
    weight, bias, _, _, _, scale_bias, _ = given_vectors.view(blocks, 7, width).unbind(1)
    # Rounded as the products take it.
    scale_weight = given.view(blocks, 5, width, width)[:, 1].to(dtype).float()
    scale = weight[..., None] * normal + bias[..., None] * shift
    grad_weight = (1 + scale_bias) * of_normal + (scale_weight * normal).sum(-1)
    grad_bias = (1 + scale_bias) * of_shift + (scale_weight * shift).sum(-1)
    grad_vectors = (
        grad_weight,
        grad_bias,
        of_first,
        of_last,
        of_shift,
        weight * of_normal + bias * of_shift,
        of_gate,
    )
    parts = (
        torch.stack((shift, scale, gate, first, last), 1), torch.stack(grad_vectors, 1), *ends
    )  # fmt: skip
    return torch.cat([part.flatten() for part in parts]).to(weights_L.dtype)


@_render.register_fake
def _(patches_MK, condition_MPW, constant_PW, weights_L, num_blocks, eps, dtype):
    return torch.empty_like(patches_MK, dtype=dtype)


@_render_backward.register_fake
def _(grad_MK, patches_MK, condition_MPW, constant_PW, weights_L, num_blocks, eps, with_patches):
    grad_patches = torch.empty_like(patches_MK) if with_patches else patches_MK.new_empty(0)
    return grad_patches, *(torch.empty_like(t) for t in (condition_MPW, constant_PW, weights_L))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_blocks, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_MK: Tensor) -> tuple[Tensor | None, ...]:
    with_patches = ctx.needs_input_grad[0]
    grads = _render_backward(grad_MK, *ctx.saved_tensors, ctx.num_blocks, ctx.eps, with_patches)
    return (grads[0] if with_patches else None, *grads[1:], None, None, None)


_render.register_autograd(_differentiate, setup_context=_keep)


def _constants(patches_MK: Tensor, condition_MPW: Tensor, num_blocks: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels are compiled for, apart from the tile."""
    _, num_pixels, width = condition_MPW.shape
    return {
        "P": num_pixels,
        "C": patches_MK.shape[1] // num_pixels,
        "W": width,
        # The minimum for a matrix product.
        "V": max(16, triton.next_power_of_2(width)),
        "BLOCKS": num_blocks,
        "DOT": DOT_TYPES[dtype],
    }


@contextlib.contextmanager
def _refuse_too_large(width: int, dtype: torch.dtype) -> Iterator[None]:
    """Triton knows what a kernel needs when it has compiled it; tiles here fit 227 KiB (H100) in any case."""
    try:
        yield
    except OutOfResources as error:
        narrower = "bf16, " if dtype == torch.float32 else ""
        raise ValueError(
            f"the Triton decoder of width {width} in {dtype} does not fit this GPU: {error.name}, "
            f"{error.required} needed, {error.limit} there; use {narrower}a width of at most {width // 2}, or "
            "kernels=torch"
        ) from error


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count

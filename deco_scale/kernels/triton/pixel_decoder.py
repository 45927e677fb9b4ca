"""The per-pixel MLP of the pixel decoder as two Triton kernels: one forward, one backward that computes it again.

They are operators of their own (``deco_scale::render_pixels`` and its backward), opaque to compilation and to
activation checkpointing, with a shape rule and a derivative. Only inputs are kept for backward.

Shape letters: M patches, P pixels of a patch, C channels, K = C * P values of a patch, W decoder width, L weights.
"""
# mypy: allow-untyped-defs
# Rules for shapes repeat the operators' arguments without their types.

import contextlib
import math
from collections.abc import Iterator
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
    (_, num_pixels, width), device = condition_MPW.shape, patches_MK.device
    constants = _constants(patches_MK, condition_MPW, num_blocks, grad_MK.dtype)
    tile = BACKWARD_TILE_FP32 if grad_MK.dtype == torch.float32 else BACKWARD_TILE[constants["V"]]
    rows = condition_MPW.shape[0] * num_pixels
    programs = _backward_programs(rows, tile, num_pixels, device)
    grad_patches = torch.empty_like(patches_MK) if with_patches else patches_MK.new_empty(0)
    grad_condition = torch.empty_like(condition_MPW)
    inputs = torch.empty(programs, num_blocks, tile, constants["V"], dtype=torch.float32, device=device)
    constant_sums = torch.zeros(programs * tile, width, dtype=torch.float32, device=device)
    weight_sums = torch.zeros(programs, weights_L.numel(), dtype=torch.float32, device=device)
    with _refuse_too_large(width, grad_MK.dtype):
        backward_kernel[(programs,)](
            patches_MK, condition_MPW, constant_PW, weights_L, grad_MK.contiguous(), grad_patches, grad_condition,
            inputs, constant_sums, weight_sums, rows, eps, **constants, T=tile, WITH_PATCHES=with_patches,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    grad_constant = constant_sums.view(-1, num_pixels, width).sum(0).to(constant_PW.dtype)
    return grad_patches, grad_condition, grad_constant, weight_sums.sum(0).to(weights_L.dtype)


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


def _backward_programs(rows: int, tile: int, num_pixels: int, device: torch.device) -> int:
    """About one per multiprocessor, such that programs times tile is a multiple of the pixels of a patch."""
    step = num_pixels // math.gcd(num_pixels, tile)
    enough = math.ceil(rows / (tile * step)) * step
    return max(step, min(_processors(device) // step * step, enough))

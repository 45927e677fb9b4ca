"""The per-pixel MLP of the pixel decoder, in chunks whose activations are recomputed in backward.

The decoder has few FLOPs and many activations: it is bound by memory traffic. A chunk of pixels passes through all
blocks while it is in the cache, and only its inputs are saved. :mod:`deco_scale.kernels.triton.pixel_decoder` has
the Triton kernels of the same computation.

Shape letters: M patches, P pixels of a patch, C channels, K = C * P values of a patch, W decoder width,
F position features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from deco_scale.kernels.select import Kernels

CHUNK_PIXELS = {"cpu": 1 << 13, "cuda": 1 << 20}
"""Pixels of a chunk by device. On a CPU its activations should fit the cache; the GPU's is not yet measured."""


class BlockWeights(NamedTuple):
    """A decoder block: norm (W), the two linears (W, W), and the modulation (3W, W) of its condition."""

    norm_weight: Tensor
    norm_bias: Tensor
    first_weight: Tensor
    first_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor
    modulation_weight: Tensor
    modulation_bias: Tensor


class DecoderWeights(NamedTuple):
    """Embedding with input projection as :func:`fold` makes it, (W, C) and (P, W); blocks; the output (C, W)."""

    folded_weight: Tensor
    folded_constant: Tensor
    blocks: Sequence[BlockWeights]
    head_weight: Tensor
    head_bias: Tensor


def fold(
    embed_weight: Tensor, embed_bias: Tensor, input_weight: Tensor, input_bias: Tensor, position_PF: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight (W, C) and constants (P, W) of the one linear that embedding and input projection are together.

    A pixel's position makes its part a constant. ``embed_weight`` (W, C + F) is of channels, then features.
    """
    channels = embed_weight.shape[1] - position_PF.shape[1]
    pixel_WC, position_WF = embed_weight.split([channels, position_PF.shape[1]], dim=1)
    embedded_PW = F.linear(position_PF.to(embed_weight.dtype), position_WF, embed_bias)
    return input_weight @ pixel_WC, F.linear(embedded_PW, input_weight, input_bias)


def render_pixels(
    patches_MK: Tensor, condition_MPW: Tensor, weights: DecoderWeights, *, eps: float, kernels: Kernels
) -> Tensor:
    """Output ``(M, K)`` of every pixel of channel-major patches; ``eps`` is that of the layer norms.

    Raises ``ValueError`` for shapes that do not fit, and with ``kernels="triton"`` for what those kernels cannot
    take.
    """
    (patches, pixels, width), channels = condition_MPW.shape, len(weights.head_weight)
    fitting = {
        "patches": (patches_MK.shape, (patches, channels * pixels)),
        "folded weight": (weights.folded_weight.shape, (width, channels)),
        "folded constant": (weights.folded_constant.shape, (pixels, width)),
        "head": (weights.head_weight.shape, (channels, width)),
    }
    for name, (actual, expected) in fitting.items():
        if actual != expected:
            raise ValueError(f"{name} {tuple(actual)} is not {expected}: condition {tuple(condition_MPW.shape)}")
    if not weights.blocks:
        raise ValueError("a pixel decoder has at least one block, got 0")
    if kernels == "torch":
        return _render_in_chunks(patches_MK, condition_MPW, weights, eps)
    # Triton is imported where it is chosen: it is not there on every machine.
    from deco_scale.kernels.triton.pixel_decoder import render_patches

    return render_patches(patches_MK, condition_MPW, weights, eps)


def _render_in_chunks(patches_MK: Tensor, condition_MPW: Tensor, weights: DecoderWeights, eps: float) -> Tensor:
    device, width = condition_MPW.device.type, condition_MPW.shape[-1]
    given = {patches_MK.dtype, condition_MPW.dtype, weights.folded_weight.dtype, weights.head_weight.dtype}
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    # Autocast leaves float64 as it is.
    autocast = autocast and torch.float64 not in given
    if len(given) > 1 and not autocast:
        raise ValueError(f"pixel decoder got types {sorted(map(str, given))}; without autocast they must be equal")
    dtype = torch.get_autocast_dtype(device) if autocast else condition_MPW.dtype
    blocks = BlockWeights(*(torch.stack(tensors) for tensors in zip(*weights.blocks, strict=True)))
    shift, scale, gate = blocks.modulation_weight.unflatten(1, (3, width)).unbind(1)
    shift_bias, scale_bias, gate_bias = blocks.modulation_bias.unflatten(1, (3, width)).unbind(1)
    # The norm's weight and bias go into the modulation, which is linear, and so does the scale's offset of one.
    weight, bias, scale_bias = blocks.norm_weight, blocks.norm_bias, 1 + scale_bias
    modulation = torch.stack((shift + bias[..., None] * scale, weight[..., None] * scale, gate), 1)
    modulation_bias = torch.stack((shift_bias + bias * scale_bias, weight * scale_bias, gate_bias), 1)
    stacked = _Weights(
        weights.folded_weight, weights.folded_constant, modulation.flatten(0, 1), modulation_bias.flatten(0, 1),
        blocks.first_weight, blocks.first_bias, blocks.last_weight, blocks.last_bias,
        weights.head_weight, weights.head_bias,
    )  # fmt: skip
    inputs = (patches_MK.to(dtype), condition_MPW.to(dtype).contiguous(), eps, *(t.to(dtype) for t in stacked))
    if not autocast:
        return _Chunks.apply(*inputs)  # type: ignore[no-any-return]
    # It would widen operands that the operations take as they are.
    with torch.autocast(device, enabled=False):
        return _Chunks.apply(*inputs)  # type: ignore[no-any-return]


class _Weights(NamedTuple):
    """As :class:`DecoderWeights`, of all blocks together, and without norms.

    ``modulation`` (3 * blocks, W, W) has shift, scale and gate of each block, one after the other.
    """

    folded: Tensor
    constant: Tensor
    modulation: Tensor
    modulation_bias: Tensor
    first: Tensor
    first_bias: Tensor
    last: Tensor
    last_bias: Tensor
    head: Tensor
    head_bias: Tensor


class _Chunks(torch.autograd.Function):
    """Only inputs are kept; backward computes each chunk again and adds to the gradients of the weights."""

    @staticmethod
    def forward(ctx: Any, patches_MK: Tensor, condition_MPW: Tensor, eps: float, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(patches_MK, condition_MPW, *weights)
        ctx.eps = eps
        out_MK = torch.empty_like(patches_MK)
        pixels = condition_MPW.shape[1]
        for patches, parts in _chunks(condition_MPW):
            chunk = _Chunk(patches, pixels, _Weights(*weights), eps, with_backward=False)
            for part in parts:
                out_MK[part] = _to_patches(chunk.forward(patches_MK[part], condition_MPW[part]), pixels)
            del chunk
        return out_MK

    @staticmethod
    def backward(ctx: Any, grad_MK: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not is_compiling():
            raise RuntimeError("the pixel decoder is differentiable once: no create_graph=True")
        with torch.no_grad():
            return _Chunks._gradients(ctx, grad_MK)

    @staticmethod
    def _gradients(ctx: Any, grad_MK: Tensor) -> tuple[Tensor | None, ...]:
        patches_MK, condition_MPW, *rest = ctx.saved_tensors
        weights = _Weights(*rest)
        sums = _Weights(*(torch.zeros_like(w, dtype=_wide(w.dtype)) for w in weights))
        grad_patches_MK = torch.empty_like(patches_MK) if ctx.needs_input_grad[0] else None
        grad_condition_MPW = torch.empty_like(condition_MPW)
        pixels = condition_MPW.shape[1]
        for patches, parts in _chunks(condition_MPW):
            chunk = _Chunk(patches, pixels, weights, ctx.eps, with_backward=True)
            for part in parts:
                chunk.forward(patches_MK[part], condition_MPW[part])
                grad_x_RW = chunk.backward(grad_MK[part], sums, grad_condition_MPW[part].flatten(0, 1))
                if grad_patches_MK is not None:
                    grad_patches_MK[part] = _to_patches(grad_x_RW.to(grad_MK.dtype) @ weights.folded, pixels)
            # Before the memory of a smaller one.
            del chunk
        grads = (total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True))
        return grad_patches_MK, grad_condition_MPW, None, *grads


def _chunks(condition_MPW: Tensor) -> list[tuple[int, list[slice]]]:
    """Patches of a chunk, and the parts of all patches with as many: at most two sizes, the smaller one last."""
    patches, pixels = condition_MPW.shape[:2]
    size = max(1, CHUNK_PIXELS.get(condition_MPW.device.type, 1 << 20) // pixels)
    whole = patches - patches % size
    found = [(size, [slice(first, first + size) for first in range(0, whole, size)])]
    return [*(found if whole else []), *([(patches - whole, [slice(whole, patches)])] if whole < patches else [])]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Norms, the residual stream and sums are fp32 at least, as in the Triton kernels."""
    return torch.promote_types(dtype, torch.float32)


def _to_pixels(patches_MK: Tensor, pixels: int) -> Tensor:
    return patches_MK.unflatten(-1, (-1, pixels)).transpose(-1, -2).flatten(0, 1)


def _to_patches(pixels_RC: Tensor, pixels: int) -> Tensor:
    return pixels_RC.unflatten(0, (-1, pixels)).transpose(-1, -2).flatten(-2)


class _Chunk:
    """R pixels through all blocks.

    Every activation has its place, used again by the next chunk: fresh memory from the system costs more than most
    operations on it.
    """

    def __init__(self, patches: int, pixels: int, weights: _Weights, eps: float, *, with_backward: bool) -> None:
        self.patches, self.pixels, self._weights, self._eps = patches, pixels, weights, eps
        self._with_backward = with_backward
        like, wide, rows = weights.first, _wide(weights.first.dtype), patches * pixels
        num_blocks, width = weights.first_bias.shape
        self._width = (width,)
        self._activated_RW, self._spare_RW = like.new_empty(2, rows, width)
        self._modulation = like.new_empty(3 * num_blocks, rows, width)
        # Without backward all blocks write to the same place.
        places = num_blocks if with_backward else 1
        # The residual stream before each block and after the last.
        stream = like.new_empty(places + with_backward, rows, width, dtype=wide)
        self._x_RW = stream.unbind() if with_backward else (stream[0],) * (num_blocks + 1)
        # Input, inner and activated inner values, and output of each block's MLP.
        mlp = like.new_empty(places, 4, rows, width)
        self._mlp = mlp.unbind() if with_backward else (mlp[0],) * num_blocks
        if with_backward:
            self._norms: list[tuple[Tensor, Tensor, Tensor]] = []
            self._grad_modulation = torch.empty_like(self._modulation)
            self._other_RW, self._wide_RW = torch.empty_like(self._spare_RW), torch.empty_like(self._x_RW[0])

    def forward(self, patches_MK: Tensor, condition_MPW: Tensor) -> Tensor:
        """Output (R, C) of every pixel."""
        weights, x_RW = self._weights, self._x_RW
        self._pixels_RC, self._condition_RW = _to_pixels(patches_MK, self.pixels), condition_MPW.flatten(0, 1)
        _silu(self._condition_RW, out=self._activated_RW)
        activated, bias = self._activated_RW.expand_as(self._modulation), weights.modulation_bias[:, None]
        torch.baddbmm(bias, activated, weights.modulation.transpose(1, 2), out=self._modulation)
        torch.mm(self._pixels_RC, weights.folded.t(), out=self._spare_RW)
        by_patch = (self.patches, self.pixels, *self._width)
        torch.add(self._spare_RW.view(by_patch), weights.constant, out=x_RW[0].view(by_patch))
        if self._with_backward:
            self._norms.clear()
        for i, (modulated_RW, inner_RW, hidden_RW, branch_RW) in enumerate(self._mlp):
            shift, scale, gate = self._modulation[3 * i : 3 * i + 3]
            torch.addcmul(shift, self._normal(x_RW[i]), scale, out=modulated_RW)
            torch.addmm(weights.first_bias[i], modulated_RW, weights.first[i].t(), out=inner_RW)
            _silu(inner_RW, out=hidden_RW)
            torch.addmm(weights.last_bias[i], hidden_RW, weights.last[i].t(), out=branch_RW)
            torch.addcmul(x_RW[i], gate, branch_RW, out=x_RW[i + 1])
        self._end_RW = self._normal(x_RW[-1]).to(weights.head.dtype)
        return F.linear(self._end_RW, weights.head, weights.head_bias)

    def _normal(self, x_RW: Tensor) -> Tensor:
        norm = torch.native_layer_norm(x_RW, self._width, None, None, self._eps)
        if self._with_backward:
            self._norms.append(norm)
        return norm[0]

    def backward(self, grad_MK: Tensor, sums: _Weights, grad_condition_RW: Tensor) -> Tensor:
        """Gradient (R, W) of the embedded pixels; writes that of the condition, adds to those of the weights."""
        weights, grad_RW, other_RW = self._weights, self._spare_RW, self._other_RW
        grad_RC = _to_pixels(grad_MK, self.pixels)
        _add_product(sums.head, sums.head_bias, grad_RC, self._end_RW)
        torch.mm(grad_RC, weights.head, out=grad_RW)
        grad_x_RW = self._through_norm(grad_RW.to(self._wide_RW.dtype), -1)
        for i in reversed(range(len(self._mlp))):
            _, scale, gate = self._modulation[3 * i : 3 * i + 3]
            grad_shift, grad_scale, grad_gate = self._grad_modulation[3 * i : 3 * i + 3]
            modulated_RW, inner_RW, hidden_RW, branch_RW = self._mlp[i]
            torch.mul(grad_x_RW, branch_RW, out=grad_gate)
            torch.mul(grad_x_RW, gate, out=grad_RW)
            _add_product(sums.last[i], sums.last_bias[i], grad_RW, hidden_RW)
            torch.mm(grad_RW, weights.last[i], out=other_RW)
            _silu_backward(other_RW, inner_RW, grad_input=grad_RW)
            _add_product(sums.first[i], sums.first_bias[i], grad_RW, modulated_RW)
            torch.mm(grad_RW, weights.first[i], out=grad_shift)
            torch.mul(grad_shift, self._norms[i][0], out=grad_scale)
            torch.mul(grad_shift, scale, out=self._wide_RW)
            grad_x_RW.add_(self._through_norm(self._wide_RW, i))
        sums.folded.add_(grad_x_RW.to(grad_RC.dtype).t() @ self._pixels_RC)
        sums.constant.add_(grad_x_RW.view(self.patches, self.pixels, -1).sum(0))
        grads, activated = self._grad_modulation, self._activated_RW.expand_as(self._grad_modulation)
        sums.modulation.add_(torch.bmm(grads.transpose(1, 2), activated))
        sums.modulation_bias.add_(grads.sum(1, dtype=sums.modulation_bias.dtype))
        torch.mm(grads[0], weights.modulation[0], out=grad_RW)
        for grad_modulation_RW, weight in zip(grads[1:], weights.modulation[1:], strict=True):
            grad_RW.addmm_(grad_modulation_RW, weight)
        _silu_backward(grad_RW, self._condition_RW, grad_input=grad_condition_RW)
        return grad_x_RW

    def _through_norm(self, grad_RW: Tensor, number: int) -> Tensor:
        _, *statistics = self._norms[number]
        needed = (True, False, False)
        grad_x_RW, _, _ = _norm_backward(grad_RW, self._x_RW[number], self._width, *statistics, None, None, needed)
        return grad_x_RW


def _add_product(of_weight: Tensor, of_bias: Tensor, grad_RW: Tensor, input_RW: Tensor) -> None:
    """Add the gradients of a linear's weight and bias to their sums."""
    of_weight.add_(grad_RW.t() @ input_RW)
    of_bias.add_(grad_RW.sum(0, dtype=of_bias.dtype))


_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input
_norm_backward = torch.ops.aten.native_layer_norm_backward.default

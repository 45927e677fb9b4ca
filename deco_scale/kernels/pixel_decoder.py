"""The per-pixel MLP of the pixel decoder, in chunks whose activations are recomputed in backward.

The decoder has few FLOPs and many activations: it is bound by memory traffic. A chunk of pixels passes through all
blocks while it is in the cache, and only its inputs are saved. :mod:`deco_scale.kernels.triton.pixel_decoder` has
the Triton kernels of the same computation.

Shape letters: M patches, P pixels of a patch, C channels, K = C * P values of a patch, W decoder width,
F position features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deco_scale.kernels.select import Kernels

CHUNK_PIXELS = {"cpu": 1 << 14, "cuda": 1 << 20}
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
    folded_weight, folded_constant, blocks, head_weight, head_bias = weights
    pixels, width = condition_MPW.shape[1:]
    pixels_MPC = patches_MK.unflatten(-1, (-1, pixels)).transpose(-1, -2)
    size = max(1, CHUNK_PIXELS.get(pixels_MPC.device.type, 1 << 20) // pixels)
    # One product for the modulations of all blocks.
    modulation_weight = torch.cat([b.modulation_weight for b in blocks])
    # The scale's offset of one goes into the bias.
    offset = head_bias.new_zeros(3, width)
    # By a number: assigning it would go through a tensor of the host.
    offset[1].fill_(1.0)
    modulation_bias = torch.cat([b.modulation_bias + offset.flatten() for b in blocks])

    def render(pixels_MPC: Tensor, condition_MPW: Tensor) -> Tensor:
        x_MPW = F.linear(pixels_MPC, folded_weight) + folded_constant
        modulations = F.linear(F.silu(condition_MPW), modulation_weight, modulation_bias).chunk(
            3 * len(blocks), -1
        )
        for number, block in enumerate(blocks):
            shift, scale, gate = modulations[3 * number : 3 * number + 3]
            hidden_MPW = F.layer_norm(x_MPW, (width,), block.norm_weight, block.norm_bias, eps)
            hidden_MPW = torch.addcmul(shift, hidden_MPW, scale)
            hidden_MPW = F.silu(F.linear(hidden_MPW, block.first_weight, block.first_bias))
            hidden_MPW = F.linear(hidden_MPW, block.last_weight, block.last_bias)
            x_MPW = torch.addcmul(x_MPW, gate, hidden_MPW)
        return F.linear(F.layer_norm(x_MPW, (width,), eps=eps), head_weight, head_bias)

    parts = zip(pixels_MPC.split(size), condition_MPW.split(size), strict=True)
    if torch.is_grad_enabled():
        outs = [checkpoint(render, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        outs = [render(*part) for part in parts]
    return torch.cat(outs).transpose(-1, -2).flatten(-2)

"""The pixel decoder written op by op, as REFERENCE and the public release have it: the twin of the fast one.

Same parameter names as :class:`deco_scale.models.pixel_decoder.PixelDecoder`, so that weights carry over.
Shape letters: B batch, N patches, P pixels of a patch, C channels, W decoder width, F features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_scale.models.layers import NORM_EPS
from deco_scale.models.pixel_decoder import PixelDecoder
from deco_scale.models.position import pixel_position_features


class StraightforwardDecoder(PixelDecoder):
    """Every activation is made, and kept for backward."""

    def forward(self, patches_BNK: Tensor, token_BND: Tensor) -> Tensor:
        num_pixels = self.patch_size**2
        pixels_BNPC = patches_BNK.unflatten(-1, (self.channels, num_pixels)).transpose(-1, -2)
        position_PF = pixel_position_features(self.patch_size, kind=self.features, device=patches_BNK.device)
        position_BNPF = position_PF.to(pixels_BNPC.dtype).expand(*pixels_BNPC.shape[:2], -1, -1)
        x_BNPW = self.input_proj(self.pixel_embed(torch.cat([pixels_BNPC, position_BNPF], dim=-1)))
        condition_BNPW = self.cond_proj(token_BND).unflatten(-1, (num_pixels, -1))
        for block in self.blocks:
            shift, scale, gate = block.modulation(condition_BNPW).chunk(3, dim=-1)  # type: ignore[operator]
            hidden_BNPW = block.norm(x_BNPW) * (1 + scale) + shift  # type: ignore[operator]
            x_BNPW = x_BNPW + gate * block.mlp(hidden_BNPW)  # type: ignore[operator]
        out_BNPC = self.head(F.layer_norm(x_BNPW, x_BNPW.shape[-1:], eps=NORM_EPS))
        return out_BNPC.transpose(-1, -2).flatten(-2)


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    assert out.requires_grad
    return sum(sizes.values())

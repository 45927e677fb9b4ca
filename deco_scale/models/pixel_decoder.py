"""Pixel decoder: renders each patch's token back to pixels with a per-pixel AdaLN MLP.

Pixels are decoded independently, so patches can be sharded over ranks in any way.
Shape letters: B batch, N patches, P pixels of a patch, C channels, K = C * P, M = B * N, D model width,
W decoder width, F features.
"""

from typing import cast

from torch import Tensor, nn

from deco_scale.kernels.pixel_decoder import BlockWeights, DecoderWeights, fold, render_pixels
from deco_scale.kernels.select import Kernels
from deco_scale.models.embeddings import PIXEL_FEATURES, PixelFeatures, pixel_position_features
from deco_scale.models.layers import NORM_EPS


class DecoderBlock(nn.Module):
    """Residual MLP whose shift, scale and gate come from the pixel's own condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def reset_parameters(self) -> None:
        """Start as the identity: a zero gate leaves the residual stream untouched."""
        first, last, modulation = self._linears()
        _init_xavier(first, last)
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)

    def weights(self) -> BlockWeights:
        """The weights for :func:`render_pixels`, which computes without calling the blocks."""
        first, last, modulation = self._linears()
        return BlockWeights(
            self.norm.weight, self.norm.bias, first.weight, first.bias, last.weight, last.bias,
            modulation.weight, modulation.bias,
        )  # fmt: skip

    def _linears(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return cast(tuple[nn.Linear, nn.Linear, nn.Linear], (self.mlp[0], self.mlp[2], self.modulation[1]))


class PixelDecoder(nn.Module):
    """Predict the output of every pixel of a patch from the noised pixels and the patch's token."""

    def __init__(
        self, *, dim: int, width: int, num_blocks: int, patch_size: int, channels: int, features: PixelFeatures
    ) -> None:
        super().__init__()
        self.patch_size, self.channels, self.features = patch_size, channels, features
        self.kernels: Kernels = "torch"
        self.pixel_embed = nn.Linear(channels + PIXEL_FEATURES, width)
        self.cond_proj = nn.Linear(dim, patch_size**2 * width)
        self.input_proj = nn.Linear(width, width)
        self.blocks = nn.ModuleList(DecoderBlock(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, channels)

    def reset_parameters(self) -> None:
        """Xavier for the linears, zero for the output; the pixel embedding keeps PyTorch's default."""
        _init_xavier(self.cond_proj, self.input_proj)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, patches_BNK: Tensor, token_BND: Tensor) -> Tensor:
        """Patches ``(B, N, C * P)``, channel-major, and tokens ``(B, N, D)`` to ``(B, N, C * P)``."""
        if patches_BNK.shape[:2] != token_BND.shape[:2]:
            raise ValueError(f"patches {patches_BNK.shape} and tokens {token_BND.shape} differ")
        position_PF = pixel_position_features(self.patch_size, kind=self.features, device=patches_BNK.device)
        embed, project = self.pixel_embed, self.input_proj
        folded = fold(embed.weight, embed.bias, project.weight, project.bias, position_PF)
        blocks = [cast(DecoderBlock, block).weights() for block in self.blocks]
        weights = DecoderWeights(*folded, blocks, self.head.weight, self.head.bias)
        condition_MPW = self.cond_proj(token_BND).unflatten(-1, (self.patch_size**2, -1)).flatten(0, 1)
        patches_MK = patches_BNK.flatten(0, 1)
        out_MK = render_pixels(patches_MK, condition_MPW, weights, eps=NORM_EPS, kernels=self.kernels)
        # A copy of three values per pixel: FSDP puts hooks on the output, which must not be a view.
        return out_MK.unflatten(0, patches_BNK.shape[:2]).clone()


def _init_xavier(*linears: nn.Linear) -> None:
    for linear in linears:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)

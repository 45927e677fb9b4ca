"""The three denoisers: text-to-image DeCo, class-conditional DeCo and the baseline DiT without a decoder.

A denoiser maps noised patches, times and a condition to a prediction of the same shape as the patches.
It knows no device, rank or file: precision, sharding and kernels are applied from outside.

Shape letters: B batch, N patches, D model width, K values of a patch (channel-major C * P), L text tokens.
"""

import functools
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from deco_scale.kernels.norm import modulate
from deco_scale.models.config import ModelConfig
from deco_scale.models.embeddings import PositionScale, rope_angles
from deco_scale.models.layers import NORM_EPS, Block, LabelEmbedder, PatchEmbed, TextEmbedder, TimestepEmbedder
from deco_scale.models.pixel_decoder import PixelDecoder


class DenoiserOutput(NamedTuple):
    """``prediction`` (B, N, K) and, where asked for, the tokens (B, N, D) after one DiT block."""

    prediction_BNK: Tensor
    hidden_BND: Tensor | None


class FinalLayer(nn.Module):
    """Output of the baseline: modulated LayerNorm without affine, then one linear to the patch."""

    def __init__(self, dim: int, patch_values: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, patch_values)

    def reset_parameters(self) -> None:
        for linear in (self.modulation, self.head):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BND: Tensor, condition_B1D: Tensor) -> Tensor:
        shift, scale = self.modulation(condition_B1D).chunk(2, dim=-1)
        return self.head(modulate(self.norm(x_BND), shift, scale))


class Denoiser(nn.Module):
    """All three kinds; they share every layer and differ in condition and output."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        is_text = cfg.kind == "t2i_deco"
        self.patch_embed = PatchEmbed(cfg.patch_values, cfg.dim)
        self.timestep_embed = TimestepEmbedder(cfg.dim)
        self.text_embed = TextEmbedder(cfg.text_dim, cfg.dim, cfg.text_tokens) if is_text else None
        self.label_embed = None if is_text else LabelEmbedder(cfg.num_classes, cfg.dim)
        block = functools.partial(
            Block, cfg.dim, cfg.num_heads, mlp_hidden_dim=cfg.mlp_hidden_dim, cast_first=not is_text
        )
        self.text_blocks = nn.ModuleList(block(with_context=False) for _ in range(cfg.num_text_blocks))
        self.blocks = nn.ModuleList(block(with_context=is_text) for _ in range(cfg.num_blocks))
        if cfg.kind == "c2i_baseline":
            self.decoder: PixelDecoder | None = None
            self.final: FinalLayer | None = FinalLayer(cfg.dim, cfg.patch_values)
        else:
            self.final = None
            self.decoder = PixelDecoder(
                dim=cfg.dim,
                width=cfg.decoder_width,
                num_blocks=cfg.decoder_blocks,
                patch_size=cfg.patch_size,
                channels=cfg.channels,
                features="rotary" if is_text else "cosine",
            )

    @property
    def transformer_blocks(self) -> tuple[nn.Module, ...]:
        """Text blocks, then image blocks."""
        return (*self.text_blocks, *self.blocks)

    @property
    def units(self) -> tuple[nn.Module, ...]:
        """Transformer blocks and pixel decoder: what engines compile, and gather alone or several together."""
        return self.transformer_blocks if self.decoder is None else (*self.transformer_blocks, self.decoder)

    def forward(
        self, patches_BNK: Tensor, t_B: Tensor, condition: Tensor, *, grid: tuple[int, int], hidden_after: int = 0
    ) -> DenoiserOutput:
        """Predict from noised patches; ``condition`` is text (B, L, T) or labels (B,).

        ``grid`` is (rows, columns) of the patches; ``hidden_after`` names the DiT block (1-based)
        whose tokens are returned too, 0 for none. Raises ``ValueError`` where shapes do not fit.
        """
        rows, cols = grid
        if patches_BNK.shape[1] != rows * cols or patches_BNK.shape[2] != self.cfg.patch_values:
            raise ValueError(f"patches {tuple(patches_BNK.shape)} do not fit the grid {grid}")
        if not 0 <= hidden_after <= len(self.blocks):
            raise ValueError(f"hidden_after={hidden_after} with {len(self.blocks)} blocks")
        time_B1D = self.timestep_embed(t_B)[:, None, :]
        context_BLD: Tensor | None = None
        if self.label_embed is not None:
            block_condition = F.silu(time_B1D + self.label_embed(condition)[:, None, :])
        else:
            assert self.text_embed is not None
            block_condition = F.silu(time_B1D)
            context_BLD = self.text_embed(condition)
            for block in self.text_blocks:
                context_BLD = block(context_BLD, block_condition)
        scale: PositionScale = "grid" if self.text_embed is not None else "fixed"
        angles_NE = rope_angles(rows, cols, head_dim=self.cfg.head_dim, scale=scale, device=patches_BNK.device)
        token_BND = self.patch_embed(patches_BNK)
        hidden_BND: Tensor | None = None
        for index, block in enumerate(self.blocks, start=1):
            token_BND = block(token_BND, block_condition, angles_NE, context_BLD)
            if index == hidden_after:
                hidden_BND = token_BND
        if self.decoder is None:
            assert self.final is not None
            return DenoiserOutput(self.final(token_BND, block_condition), hidden_BND)
        # The token that conditions the pixels sees the time again, but not the label.
        semantic_BND = F.silu(time_B1D + token_BND)
        return DenoiserOutput(self.decoder(patches_BNK, semantic_BND), hidden_BND)


def patchify(image_BCYX: Tensor, patch_size: int) -> Tensor:
    """``(B, C, rows * ps, cols * ps)`` to ``(B, rows * cols, C * ps * ps)``, channel-major patches."""
    batch, channels, height, width = image_BCYX.shape
    rows, cols = height // patch_size, width // patch_size
    split = image_BCYX.reshape(batch, channels, rows, patch_size, cols, patch_size)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * cols, channels * patch_size * patch_size)


def unpatchify(patches_BNK: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of :func:`patchify`."""
    rows, cols = grid
    split = patches_BNK.unflatten(-1, (-1, patch_size, patch_size)).unflatten(1, (rows, cols))
    return split.permute(0, 3, 1, 4, 2, 5).reshape(patches_BNK.shape[0], -1, rows * patch_size, cols * patch_size)

"""The model and its losses written op by op, as REFERENCE and the public release have them: slow twins.

The classes here subclass those of ``deco_scale`` and replace ``forward`` only, so parameters have the same names
and weights carry over. Every intermediate result is a tensor of its own. Shared with the fast code are position
angles, pixel features, the table of JPEG weights, and modules that are linears or a look-up and nothing else.
Attention is PyTorch's ``scaled_dot_product_attention``, which eager code calls anyway.

Shape letters: B batch, N patches, M keys, L text tokens, D model width, H heads, K head width or values of a
patch, E pairs of a head, P pixels of a patch, C channels, W decoder width, F features, Y X pixels.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_scale.models import Denoiser, DenoiserOutput
from deco_scale.models.denoiser import FinalLayer
from deco_scale.models.embeddings import PositionScale, pixel_position_features, rope_angles
from deco_scale.models.layers import NORM_EPS, Attention, Block, RMSNorm, SwiGLU, TimestepEmbedder
from deco_scale.models.pixel_decoder import PixelDecoder
from deco_scale.objectives import Objective
from deco_scale.objectives.frequency import frequency_weights

_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_DCT = 8
_SINUSOIDS, _MAX_PERIOD = 128, 10.0


class ReferenceDecoder(PixelDecoder):
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


class ReferenceRMSNorm(RMSNorm):
    """Statistics in fp32 at least; the text model multiplies by the weight before it casts, the other after."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        if self.cast_first:
            return self.weight.to(x.dtype) * normed.to(x.dtype)
        return (self.weight.to(wide.dtype) * normed).to(x.dtype)


def rope(x_BNHK: Tensor, angles_NE: Tensor) -> Tensor:
    """Adjacent values of a head are a complex number, turned by its patch's angle."""
    wide = x_BNHK if x_BNHK.dtype == torch.float64 else x_BNHK.float()
    angles_N1E = angles_NE.to(wide.dtype)[:, None, :]
    turns = torch.polar(torch.ones_like(angles_N1E), angles_N1E)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x_BNHK.dtype)


class ReferenceAttention(Attention):
    """Softmax attention of image (or text) tokens to themselves and to the context's."""

    def forward(  # type: ignore[override]
        self, x_BND: Tensor, angles_NE: Tensor | None = None, context_BLD: Tensor | None = None
    ) -> Tensor:
        q_BNHK, k_BMHK, v_BMHK = self.qkv(x_BND).unflatten(-1, (-1, 3, self.head_dim)).unbind(dim=-2)
        q_BNHK, k_BMHK = self.q_norm(q_BNHK), self.k_norm(k_BMHK)
        if angles_NE is not None:
            q_BNHK, k_BMHK = rope(q_BNHK, angles_NE), rope(k_BMHK, angles_NE)
        if self.context_kv is not None:
            context_kv = self.context_kv(context_BLD).unflatten(-1, (-1, 2, self.head_dim))
            context_k, context_v = context_kv.unbind(dim=-2)
            k_BMHK = torch.cat([k_BMHK, self.k_norm(context_k)], dim=1)
            v_BMHK = torch.cat([v_BMHK, context_v], dim=1)
        q_BHNK, k_BHMK, v_BHMK = (z.transpose(1, 2) for z in (q_BNHK, k_BMHK, v_BMHK))
        out_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHMK, v_BHMK)
        return cast(Tensor, self.proj(out_BHNK.transpose(1, 2).flatten(-2)))


class ReferenceSwiGLU(SwiGLU):
    """Gate, up, product, down."""

    def forward(self, x_BND: Tensor) -> Tensor:
        gate, up = self.gate_up.weight.chunk(2)
        return cast(Tensor, self.down(F.silu(F.linear(x_BND, gate)) * F.linear(x_BND, up)))


class ReferenceBlock(Block):
    """AdaLN, attention, AdaLN, SwiGLU."""

    def forward(  # type: ignore[override]
        self,
        x_BND: Tensor,
        condition_B1D: Tensor,
        angles_NE: Tensor | None = None,
        context_BLD: Tensor | None = None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition_B1D).chunk(6, dim=-1)
        hidden = self.norm1(x_BND) * (1 + scale1) + shift1
        x_BND = x_BND + gate1 * self.attn(hidden, angles_NE, context_BLD)
        hidden = self.norm2(x_BND) * (1 + scale2) + shift2
        return x_BND + gate2 * self.mlp(hidden)


class ReferenceTime(TimestepEmbedder):
    """128 cosines, 128 sines, and two linears."""

    def forward(self, t_B: Tensor) -> Tensor:
        steps = torch.arange(_SINUSOIDS, dtype=torch.float32, device=t_B.device) / _SINUSOIDS
        angles = t_B.float()[:, None] * torch.exp(-math.log(_MAX_PERIOD) * steps)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.hidden.weight.dtype)
        return cast(Tensor, self.out(F.silu(self.hidden(features))))


class ReferenceFinal(FinalLayer):
    """The baseline's output."""

    def forward(self, x_BND: Tensor, condition_B1D: Tensor) -> Tensor:
        shift, scale = self.modulation(condition_B1D).chunk(2, dim=-1)
        normed = F.layer_norm(x_BND, x_BND.shape[-1:], eps=NORM_EPS)
        return cast(Tensor, self.head(normed * (1 + scale) + shift))


class ReferenceDenoiser(Denoiser):
    """The three denoisers in one eager pass."""

    def forward(
        self,
        patches_BNK: Tensor,
        t_B: Tensor,
        condition: Tensor,
        *,
        grid: tuple[int, int],
        hidden_after: int = 0,
    ) -> DenoiserOutput:
        time_B1D = self.timestep_embed(t_B)[:, None, :]
        context_BLD: Tensor | None = None
        if self.label_embed is not None:
            adaln_B1D = F.silu(time_B1D + self.label_embed(condition)[:, None, :])
        else:
            assert self.text_embed is not None
            adaln_B1D, context_BLD = F.silu(time_B1D), self.text_embed(condition)
            for block in self.text_blocks:
                context_BLD = block(context_BLD, adaln_B1D)
        scale: PositionScale = "grid" if self.cfg.kind == "t2i_deco" else "fixed"
        angles_NE = rope_angles(*grid, head_dim=self.cfg.head_dim, scale=scale, device=patches_BNK.device)
        token_BND = self.patch_embed(patches_BNK)
        hidden_BND: Tensor | None = None
        for index, block in enumerate(self.blocks, start=1):
            token_BND = block(token_BND, adaln_B1D, angles_NE, context_BLD)
            if index == hidden_after:
                hidden_BND = token_BND
        if self.final is not None:
            return DenoiserOutput(self.final(token_BND, adaln_B1D), hidden_BND)
        assert self.decoder is not None
        return DenoiserOutput(self.decoder(patches_BNK, F.silu(time_B1D + token_BND)), hidden_BND)


def block_dct(image_BCYX: Tensor) -> Tensor:
    """YCbCr of an RGB image, and the orthonormal DCT-II of each 8 x 8 block: ``(B, C, Y / 8, X / 8, 8, 8)``."""
    matrix = torch.tensor(_YCBCR, dtype=image_BCYX.dtype, device=image_BCYX.device)
    ycbcr = torch.einsum("dc,bcyx->bdyx", matrix, image_BCYX)
    n = torch.arange(_DCT, dtype=image_BCYX.dtype, device=image_BCYX.device)
    dct = torch.cos(math.pi * (2 * n + 1) * n[:, None] / (2 * _DCT)) * math.sqrt(2 / _DCT)
    dct[0] = math.sqrt(1 / _DCT)
    blocks = ycbcr.unflatten(-1, (-1, _DCT)).unflatten(-3, (-1, _DCT)).transpose(-3, -2)
    return dct @ blocks @ dct.T


class ReferenceObjective(Objective):
    """Flow, frequency and REPA losses, with the DCT of both velocities as whole images; sides divide by 8."""

    def forward(
        self,
        image_BCYX: Tensor,
        noise_BCYX: Tensor,
        t_B: Tensor,
        condition: Tensor,
        features_BNF: Tensor | None = None,
    ) -> dict[str, Tensor]:
        model, cfg = self.denoiser.cfg, self.cfg
        batch, size, (rows, cols) = image_BCYX.shape[0], model.patch_size, model.grid(*image_BCYX.shape[-2:])
        cut, whole = (batch, -1, rows, size, cols, size), (batch, rows, cols, -1, size, size)
        t = t_B[:, None, None, None]
        noised_BCYX = t * image_BCYX + (1 - t) * noise_BCYX
        patches_BNK = noised_BCYX.reshape(cut).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * cols, -1)
        layer = cfg.repa_layer if self.repa_head is not None else 0
        out = self.denoiser(patches_BNK, t_B, condition, grid=(rows, cols), hidden_after=layer)
        predicted = out.prediction_BNK.to(image_BCYX.dtype).reshape(whole).permute(0, 3, 1, 4, 2, 5)
        predicted_BCYX = predicted.reshape(image_BCYX.shape)
        velocity_BCYX = image_BCYX - noise_BCYX
        losses = {"loss_flow": (predicted_BCYX - velocity_BCYX).square().mean()}
        losses["loss"] = losses["loss_flow"]
        if cfg.freq_weight > 0:
            weights = frequency_weights(cfg.freq_quality, gamma=cfg.freq_gamma, mode=cfg.freq_mode)
            weights = weights.to(predicted_BCYX)[None, :, None, None]
            squared = (block_dct(predicted_BCYX) - block_dct(velocity_BCYX)).square()
            losses["loss_freq"] = (weights * squared).mean()
            losses["loss"] = losses["loss"] + cfg.freq_weight * losses["loss_freq"]
        if self.repa_head is not None and out.hidden_BND is not None and features_BNF is not None:
            projected = self.repa_head.layers(out.hidden_BND).to(features_BNF.dtype)
            cosine = (projected * features_BNF).sum(-1) / (projected.norm(dim=-1) * features_BNF.norm(dim=-1))
            losses["loss_repa"] = (1 - cosine).mean()
            losses["loss"] = losses["loss"] + cfg.repa_weight * losses["loss_repa"]
        return losses


REFERENCE_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    RMSNorm: ReferenceRMSNorm,
    Attention: ReferenceAttention,
    SwiGLU: ReferenceSwiGLU,
    Block: ReferenceBlock,
    TimestepEmbedder: ReferenceTime,
    FinalLayer: ReferenceFinal,
    PixelDecoder: ReferenceDecoder,
    Denoiser: ReferenceDenoiser,
    Objective: ReferenceObjective,
}


def make_reference(objective: Objective) -> Objective:
    """Turn every module of a plain objective, in place, into its twin with the same parameters."""
    for module in list(objective.modules()):
        module.__class__ = REFERENCE_CLASSES.get(type(module), type(module))
    return objective


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

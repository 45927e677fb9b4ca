"""Layers shared by the three model kinds.

Shape letters: B batch, N tokens, L text tokens, D model width, H heads, K head width, T text encoder width,
M keys, P parts of a fused projection.
Linears are laid out for tensor parallelism: the rows of a fused projection are ordered (head, part, K), so
that a plain slice of dimension 0 holds whole heads; docs/architecture.md has the table.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_scale.kernels.norm import (
    gated_residual,
    norm_modulate,
    qk_norm_rope,
    residual_norm_modulate,
    rms_norm,
)
from deco_scale.kernels.select import Kernels
from deco_scale.kernels.swiglu import swiglu
from deco_scale.models.attention.dispatch import AttentionSetting, attention
from deco_scale.models.embeddings import TIMESTEP_FEATURES, timestep_features
from deco_scale.models.stored_names import from_stored, to_stored

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """RMSNorm with fp32 statistics, and its fusions with the operations around it.

    The text model multiplies by the weight in fp32 and then casts; the class model casts first (``cast_first``).
    In fp32 both are the same.
    """

    kernels: Kernels = "torch"

    def __init__(self, dim: int, *, cast_first: bool) -> None:
        super().__init__()
        self.cast_first = cast_first
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=NORM_EPS, cast_first=self.cast_first, kernels=self.kernels)

    def modulated(self, x_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens for the residual stream, and their norm with shift and scale."""
        return norm_modulate(
            x_BND, self.weight, shift_B1D, scale_B1D,
            eps=NORM_EPS, cast_first=self.cast_first, kernels=self.kernels,
        )  # fmt: skip

    def residual_modulated(
        self, x_BND: Tensor, gate_B1D: Tensor, y_BND: Tensor, shift_B1D: Tensor, scale_B1D: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual stream ``x + gate * y``, and its norm with shift and scale."""
        return residual_norm_modulate(
            x_BND, gate_B1D, y_BND, self.weight, shift_B1D, scale_B1D,
            eps=NORM_EPS, cast_first=self.cast_first, kernels=self.kernels,
        )  # fmt: skip


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases; gate and up are one linear.

    Its rows are those of gate, then those of up, so that each half of the outputs is contiguous. ``state_dict``
    and ``load_state_dict`` use the stored names ``gate.weight`` and ``up.weight``.
    """

    kernels: Kernels = "torch"

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        self.register_state_dict_post_hook(_split_parts)
        self.register_load_state_dict_pre_hook(_join_parts)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x_BND), kernels=self.kernels))


def _split_parts(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    _rename(state, prefix, to_stored)


def _join_parts(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    _rename(state, prefix, from_stored)


def _rename(
    state: dict[str, Any], prefix: str, convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> None:
    # The table has the names within a block.
    own = {f"mlp.{n.removeprefix(prefix)}": state.pop(n) for n in list(state) if n.startswith(prefix)}
    state.update({prefix + n.removeprefix("mlp."): value for n, value in convert(own).items()})


class Attention(nn.Module):
    """Self-attention with q/k norm and optional RoPE; text tokens may extend keys and values."""

    def __init__(self, dim: int, num_heads: int, *, with_context: bool, cast_first: bool) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.backend: AttentionSetting = "auto"
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.context_kv = nn.Linear(dim, 2 * dim, bias=False) if with_context else None
        self.q_norm = RMSNorm(self.head_dim, cast_first=cast_first)
        self.k_norm = RMSNorm(self.head_dim, cast_first=cast_first)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor, angles_NE: Tensor | None = None, context_BLD: Tensor | None = None) -> Tensor:
        # The number of heads follows from the projection, which may be a slice of it under tp.
        qkv_BNHPK = self.qkv(x_BND).unflatten(-1, (-1, 3, self.head_dim))
        context_kv_BLHPK: Tensor | None = None
        if self.context_kv is not None:
            assert context_BLD is not None
            context_kv_BLHPK = self.context_kv(context_BLD).unflatten(-1, (-1, 2, self.head_dim))
        q_norm, k_norm = self.q_norm, self.k_norm
        q_BNHK, k_BMHK, v_BMHK = qk_norm_rope(
            qkv_BNHPK, context_kv_BLHPK, q_norm.weight, k_norm.weight, angles_NE,
            eps=NORM_EPS, cast_first=q_norm.cast_first, kernels=q_norm.kernels,
        )  # fmt: skip
        out_BNHK = attention(q_BNHK, k_BMHK, v_BMHK, self.backend)
        return self.proj(out_BNHK.flatten(-2))


class Block(nn.Module):
    """Transformer block with AdaLN: shift, scale and gate of attention and MLP come from the condition.

    An image block has RoPE and text tokens as additional keys and values, a text block neither. The gated residual
    of attention and the next norm are one operation; that of the MLP is not fused with the next block's norm,
    because FSDP, compilation and checkpointing take blocks one by one.
    """

    kernels: Kernels = "torch"

    def __init__(
        self, dim: int, num_heads: int, *, mlp_hidden_dim: int, with_context: bool, cast_first: bool
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim, cast_first=cast_first)
        self.attn = Attention(dim, num_heads, with_context=with_context, cast_first=cast_first)
        self.norm2 = RMSNorm(dim, cast_first=cast_first)
        self.mlp = SwiGLU(dim, mlp_hidden_dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        x_BND: Tensor,
        condition_B1D: Tensor,
        angles_NE: Tensor | None = None,
        context_BLD: Tensor | None = None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition_B1D).chunk(6, -1)
        x_BND, hidden_BND = self.norm1.modulated(x_BND, shift1, scale1)
        attended_BND = self.attn(hidden_BND, angles_NE, context_BLD)
        x_BND, hidden_BND = self.norm2.residual_modulated(x_BND, gate1, attended_BND, shift2, scale2)
        return gated_residual(x_BND, gate2, self.mlp(hidden_BND), kernels=self.kernels)


class TimestepEmbedder(nn.Module):
    """Times in [0, 1] to ``(B, D)``: sinusoids and a two-layer SiLU MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(TIMESTEP_FEATURES, dim)
        self.out = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Weights N(0, 0.02) as in the release; the biases keep their default."""
        nn.init.normal_(self.hidden.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02)

    def forward(self, t_B: Tensor) -> Tensor:
        features = timestep_features(t_B).to(self.hidden.weight.dtype)
        return self.out(F.silu(self.hidden(features)))


class LabelEmbedder(nn.Module):
    """Embedding table of the classes and, as its last row, the null class."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, label_B: Tensor) -> Tensor:
        return self.table(label_B)


class TextEmbedder(nn.Module):
    """Text embeddings ``(B, L, T)`` to ``(B, L, D)`` with a learned position per token."""

    def __init__(self, text_dim: int, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.proj = nn.Linear(text_dim, dim)
        self.norm = RMSNorm(dim, cast_first=False)
        self.position = nn.Parameter(torch.empty(1, num_tokens, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.position)

    def forward(self, text_BLT: Tensor) -> Tensor:
        if text_BLT.shape[1] != self.position.shape[1]:
            raise ValueError(
                f"text has {text_BLT.shape[1]} tokens, the model was built for {self.position.shape[1]}"
            )
        return self.norm(self.proj(text_BLT)) + self.position


class PatchEmbed(nn.Linear):
    """Flattened patches to tokens."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

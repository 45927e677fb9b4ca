"""The table between the public DeCo release's tensors and ours, used in both directions.

The release orders the rows of a fused projection (part, head, K); ours are (head, part, K), so that a
tensor-parallel slice is plain. The release fuses gate and up of the text model's SwiGLU; ours are stored apart.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deco_scale.models import ModelConfig

DENOISER, EMA, REPA = "denoiser.", "ema_denoiser.", "diffusion_trainer.proj.0."
"""Prefixes of the release's state dict for weights, averaged weights and the REPA head."""


@dataclass(frozen=True, slots=True)
class Rule:
    """``release`` name and our names of the same numbers; several of ours are its rows one after another.

    With ``parts`` above 1 the release's rows are ordered (part, head, K) and ours (head, part, K).
    """

    release: str
    ours: tuple[str, ...]
    parts: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether rows of one tensor are rows of the other."""
        return self.parts == 1 and len(self.ours) == 1

    def split(self, tensor: Tensor, cfg: ModelConfig) -> tuple[Tensor, ...]:
        """Ours from the release's."""
        if self.parts > 1:
            return (_regrouped(tensor, self.parts, cfg.num_heads),)
        return tensor.chunk(len(self.ours)) if len(self.ours) > 1 else (tensor,)

    def join(self, tensors: Sequence[Tensor], cfg: ModelConfig) -> Tensor:
        """The release's from ours."""
        if self.parts > 1:
            return _regrouped(tensors[0], cfg.num_heads, self.parts)
        return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _regrouped(tensor: Tensor, first: int, second: int) -> Tensor:
    """Rows of (first, second, K) in the order (second, first, K)."""
    return tensor.unflatten(0, (first, second, -1)).transpose(0, 1).reshape(tensor.shape)


def _same(release: str, ours: str) -> Rule:
    return Rule(release, (ours,))


_BLOCK = [
    *(_same(f"{name}.weight", f"{name}.weight") for name in ("norm1", "norm2", "attn.q_norm", "attn.k_norm")),
    *(_same(f"attn.proj.{kind}", f"attn.proj.{kind}") for kind in ("weight", "bias")),
    *(_same(f"adaLN_modulation.0.{kind}", f"modulation.{kind}") for kind in ("weight", "bias")),
]
_QKV = Rule("attn.qkv.weight", ("attn.qkv.weight",), parts=3)
_CLASS_BLOCK = [
    *_BLOCK,
    _QKV,
    _same("mlp.w1.weight", "mlp.gate.weight"),
    _same("mlp.w3.weight", "mlp.up.weight"),
    _same("mlp.w2.weight", "mlp.down.weight"),
]
_TEXT_MLP = [
    Rule("mlp.w12.weight", ("mlp.gate.weight", "mlp.up.weight")),
    _same("mlp.w3.weight", "mlp.down.weight"),
]
_TEXT_BLOCK = [*_BLOCK, _QKV, *_TEXT_MLP]
"""A block on the text alone."""
_JOINT_BLOCK = [
    *_BLOCK,
    Rule("attn.qkv_x.weight", ("attn.qkv.weight",), parts=3),
    Rule("attn.kv_y.weight", ("attn.context_kv.weight",), parts=2),
    *_TEXT_MLP,
]
"""A block on the image, with attention to the text."""


def _module(release: str, ours: str) -> list[Rule]:
    return [_same(f"{release}.{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def _within(rules: list[Rule], release: str, ours: str) -> list[Rule]:
    return [
        dataclasses.replace(r, release=f"{release}.{r.release}", ours=tuple(f"{ours}.{o}" for o in r.ours))
        for r in rules
    ]


def denoiser_rules(cfg: ModelConfig) -> list[Rule]:
    """All rules of one model, with block numbers filled in."""
    rules: list[Rule] = []
    is_text = cfg.kind == "t2i_deco"
    for i in range(cfg.num_blocks):
        rules += _within(_JOINT_BLOCK if is_text else _CLASS_BLOCK, f"blocks.{i}", f"blocks.{i}")
    for i in range(cfg.num_text_blocks):
        rules += _within(_TEXT_BLOCK, f"text_refine_blocks.{i}", f"text_blocks.{i}")
    embed = "x_embedder.proj" if cfg.kind == "c2i_baseline" else "s_embedder.proj"
    rules += _module(embed, "patch_embed")
    rules += _module("t_embedder.mlp.0", "timestep_embed.hidden")
    rules += _module("t_embedder.mlp.2", "timestep_embed.out")
    if is_text:
        rules += _module("y_embedder.proj", "text_embed.proj")
        rules.append(_same("y_embedder.norm.weight", "text_embed.norm.weight"))
        rules.append(_same("y_pos_embedding", "text_embed.position"))
    else:
        rules.append(_same("y_embedder.embedding_table.weight", "label_embed.table.weight"))
    if cfg.kind == "c2i_baseline":
        rules += _module("final_layer.adaLN_modulation.0", "final.modulation")
        return rules + _module("final_layer.linear", "final.head")
    rules += _module("x_embedder.embedder.0", "decoder.pixel_embed")
    rules += _module("dec_net.cond_embed", "decoder.cond_proj")
    rules += _module("dec_net.input_proj", "decoder.input_proj")
    rules += _module("dec_net.final_layer.linear", "decoder.head")
    for i in range(cfg.decoder_blocks):
        here, there = f"dec_net.res_blocks.{i}", f"decoder.blocks.{i}"
        rules += _module(f"{here}.in_ln", f"{there}.norm")
        rules += _module(f"{here}.mlp.0", f"{there}.mlp.0")
        rules += _module(f"{here}.mlp.2", f"{there}.mlp.2")
        rules += _module(f"{here}.adaLN_modulation.1", f"{there}.modulation.1")
    return rules


def denoiser_to_release(state: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """A denoiser's tensors, or their gradients, by the release's names without prefix."""
    return {r.release: r.join([state[o] for o in r.ours], cfg) for r in denoiser_rules(cfg)}

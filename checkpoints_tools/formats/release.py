"""The table between the public DeCo release's tensors and ours, used in both directions.

The release orders the rows of a fused projection (part, head, K); ours are (head, part, K), so that a
tensor-parallel slice is plain. The release fuses gate and up of the text model's SwiGLU; ours are separate.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deco_scale.models import ModelConfig

DENOISER, EMA, REPA = "denoiser.", "ema_denoiser.", "diffusion_trainer.proj.0."
"""Prefixes of the release's state dict for weights, averaged weights and the REPA head."""


@dataclass(frozen=True, slots=True)
class Rule:
    """``release`` name, our names, and the two conversions between their tensors.

    ``plain`` says that both tensors are the same, so that rows of one are rows of the other.
    """

    release: str
    ours: tuple[str, ...]
    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
    join: Callable[[tuple[Tensor, ...], ModelConfig], Tensor]
    plain: bool = False


def _same(release: str, ours: str) -> Rule:
    return Rule(release, (ours,), lambda t, _: (t,), lambda ts, _: ts[0], plain=True)


def _heads(release: str, ours: str, parts: int) -> Rule:
    def regroup(tensor: Tensor, first: int, second: int) -> Tensor:
        grouped = tensor.unflatten(0, (first, second, -1)).transpose(0, 1)
        return grouped.reshape(tensor.shape)

    return Rule(
        release,
        (ours,),
        lambda t, cfg: (regroup(t, parts, cfg.num_heads),),
        lambda ts, cfg: regroup(ts[0], cfg.num_heads, parts),
    )


_BLOCK = [
    _same("norm1.weight", "norm1.weight"),
    _same("norm2.weight", "norm2.weight"),
    _same("attn.q_norm.weight", "attn.q_norm.weight"),
    _same("attn.k_norm.weight", "attn.k_norm.weight"),
    _same("attn.proj.weight", "attn.proj.weight"),
    _same("attn.proj.bias", "attn.proj.bias"),
    _same("adaLN_modulation.0.weight", "modulation.weight"),
    _same("adaLN_modulation.0.bias", "modulation.bias"),
    _heads("attn.qkv.weight", "attn.qkv.weight", 3),
    _heads("attn.qkv_x.weight", "attn.qkv.weight", 3),
    _heads("attn.kv_y.weight", "attn.context_kv.weight", 2),
    Rule(
        "mlp.w12.weight",
        ("mlp.gate.weight", "mlp.up.weight"),
        lambda t, _: tuple(t.chunk(2)),
        lambda ts, _: torch.cat(ts),
    ),
    _same("mlp.w1.weight", "mlp.gate.weight"),
]


def _block_rules(cfg: ModelConfig, *, text_block: bool) -> list[Rule]:
    """Rules inside a block; the two models name the same things differently (w3 is up or down)."""
    is_text = cfg.kind == "t2i_deco"
    unused = (
        {"mlp.w1.weight", "attn.qkv_x.weight" if text_block else "attn.qkv.weight"}
        if is_text
        else {"mlp.w12.weight", "attn.qkv_x.weight", "attn.kv_y.weight"}
    )
    if text_block:
        unused.add("attn.kv_y.weight")
    rules = [rule for rule in _BLOCK if rule.release not in unused]
    if is_text:
        return [*rules, _same("mlp.w3.weight", "mlp.down.weight")]
    return [
        *rules,
        _same("mlp.w3.weight", "mlp.up.weight"),
        _same("mlp.w2.weight", "mlp.down.weight"),
    ]


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
    for i in range(cfg.num_blocks):
        rules += _within(_block_rules(cfg, text_block=False), f"blocks.{i}", f"blocks.{i}")
    for i in range(cfg.num_text_blocks):
        rules += _within(_block_rules(cfg, text_block=True), f"text_refine_blocks.{i}", f"text_blocks.{i}")
    embed = "x_embedder.proj" if cfg.kind == "c2i_baseline" else "s_embedder.proj"
    rules += _module(embed, "patch_embed")
    rules += _module("t_embedder.mlp.0", "timestep_embed.hidden")
    rules += _module("t_embedder.mlp.2", "timestep_embed.out")
    if cfg.kind == "t2i_deco":
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
    return {r.release: r.join(tuple(state[o] for o in r.ours), cfg) for r in denoiser_rules(cfg)}

"""Moves tokens between the ranks of a tp group: each has its own between blocks, attention and MLP see all.

Tokens keep their shape (B, N, D), but lie in memory as (N, B, D) from the embeddings to the decoder. Gather and
reduce-scatter then need no copy, linears compute on the transposed view, elementwise operations keep the order.

Inside of blocks modules change their class, as by FSDP2's ``fully_shard``, and get no hooks: ``torch.compile``
guards on each module's hooks, and would make a graph for each block.

Shape letters: B batch, N tokens, n tokens of this rank, D any width.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deco_scale.models.layers import Block
from deco_scale.models.tp_plan import split_of
from deco_scale.objectives import Objective
from deco_scale.parallel.sequence_parallel import TokenShard


@dataclass
class SequenceLength:
    """Number of tokens of the whole sequence in the current forward pass."""

    tokens: int = 0


class Gathering:
    """Mixin of modules that take all tokens."""

    token_shard: TokenShard
    length: SequenceLength

    def gather(self, x_BnD: Tensor) -> Tensor:
        device = x_BnD.device.type
        if torch.is_autocast_enabled(device):
            # In autocast's type, to which the linears would cast it: half the bytes to send.
            x_BnD = x_BnD.to(torch.get_autocast_dtype(device))
        return self.token_shard.gather(x_BnD, self.length.tokens)


class AllTokens(Gathering):
    """Mixin of attention: its input is gathered."""

    def forward(self, x_BnD: Tensor, *args: Any) -> Tensor:
        return super().forward(self.gather(x_BnD), *args)  # type: ignore[misc,no-any-return]


class AllTokensMlp(Gathering):
    """Mixin of the MLP, to which the order of tokens is nothing: computes on (N, B, D), then sums over ranks."""

    def forward(self, x_BnD: Tensor) -> Tensor:
        partial_NBD = super().forward(self.gather(x_BnD).transpose(0, 1))  # type: ignore[misc]
        return self.token_shard.scatter_sum(partial_NBD.transpose(0, 1))


class SequenceFirst:
    """Mixin of attention's linears that are split by outputs: computes on (N, B, D), as tokens lie in memory."""

    def forward(self, x_BND: Tensor) -> Tensor:
        return super().forward(x_BND.transpose(0, 1)).transpose(0, 1)  # type: ignore[misc,no-any-return]


class PartialSums(SequenceFirst):
    """Mixin of linears that are split by inputs: each rank gets its own tokens of the sum over ranks."""

    token_shard: TokenShard

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.token_shard.scatter_sum(super().forward(x_BND))


def route_tokens(objective: Objective, shard: TokenShard) -> None:
    """Hand each rank its own tokens, gather them for attention and MLP, and scatter the sums."""
    objective.tokens = shard
    denoiser = objective.denoiser
    image, text = SequenceLength(), SequenceLength()

    def own_patches(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image.tokens = args[0].shape[1]
        return (shard.own(args[0]).transpose(0, 1), *args[1:])

    def own_text(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        text.tokens = output.shape[1]
        return shard.own(output).transpose(0, 1).contiguous().transpose(0, 1)

    def gather_text(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # A copy: FSDP hooks into the block's output, which must not be a view.
        return shard.gather(output, text.tokens).clone()

    denoiser.patch_embed.register_forward_pre_hook(own_patches)
    denoiser.patch_embed.register_forward_hook(lambda m, args, output: output.transpose(0, 1))
    if denoiser.decoder is not None:
        denoiser.decoder.register_forward_pre_hook(lambda m, args: (shard.own(args[0]), *args[1:]))
    if denoiser.text_embed is not None and len(denoiser.text_blocks):
        denoiser.text_embed.register_forward_hook(own_text)
        denoiser.text_blocks[-1].register_forward_hook(gather_text)
    for length, blocks in ((image, denoiser.blocks), (text, denoiser.text_blocks)):
        for block in blocks:
            assert isinstance(block, Block)
            _route_block(block, shard, length)


def _route_block(block: Block, shard: TokenShard, length: SequenceLength) -> None:
    for name, linear in list(block.attn.named_children()):
        split = split_of(f"attn.{name}.weight")
        if split == "column":
            _mix_in(SequenceFirst, linear)
        elif split == "row":
            _mix_in(PartialSums, linear, token_shard=shard)
    _mix_in(AllTokens, block.attn, token_shard=shard, length=length)
    _mix_in(AllTokensMlp, block.mlp, token_shard=shard, length=length)


def _mix_in(mixin: type, module: nn.Module, **attributes: Any) -> None:
    module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]
    for name, value in attributes.items():
        setattr(module, name, value)


@functools.cache
def _mixed(mixin: type, cls: type) -> type:
    """One class for all modules of a class, so that compiled blocks share their graphs."""
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {})

"""Tokens spread over a tp group, and the collectives that move them; each has the other as its adjoint.

A sequence of N tokens is cut into consecutive parts that differ by at most one token. Every rank's graph
computes the gradient of its own share of the loss, so gradients of replicated weights are summed over tp.

Shape letters: B batch, N tokens, n tokens of this rank, D any width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deco_scale.models.compile import outside_graphs
from deco_scale.models.tp_plan import part_sizes
from deco_scale.parallel.engines.base import TokenGroup


@dataclass(frozen=True)
class TokenShard:
    """This rank's place in a tp group."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def own(self, x_BND: Tensor) -> Tensor:
        """This rank's tokens ``(B, n, D)`` of a replicated sequence; no communication."""
        sizes = part_sizes(x_BND.shape[1], self.size)
        return x_BND.narrow(1, sum(sizes[: self.rank]), sizes[self.rank])

    def share(self, count: int) -> float:
        """Share of ``count`` tokens that this rank has; the shares of a group sum to one."""
        return part_sizes(count, self.size)[self.rank] / count

    @outside_graphs
    def gather(self, x_BnD: Tensor, count: int) -> Tensor:
        """All tokens ``(B, N, D)`` on every rank; backward sums each token's gradient to its owner."""
        return _Gather.apply(x_BnD, count, self)  # type: ignore[no-any-return]

    @outside_graphs
    def scatter_sum(self, x_BND: Tensor) -> Tensor:
        """Sum of the ranks' partial results, each rank its own tokens; backward gathers."""
        return _ScatterSum.apply(x_BND, self)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BnD: Tensor, count: int, shard: TokenShard) -> Tensor:
        ctx.shard = shard
        return _all_gather(x_BnD, count, shard)

    @staticmethod
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad_BND, ctx.shard), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, shard: TokenShard) -> Tensor:
        ctx.shard, ctx.count = shard, x_BND.shape[1]
        return _reduce_scatter(x_BND, shard)

    @staticmethod
    def backward(ctx: Any, grad_BnD: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad_BnD, ctx.count, ctx.shard), None


def _all_gather(x_BnD: Tensor, count: int, shard: TokenShard) -> Tensor:
    sizes = part_sizes(count, shard.size)
    # Collectives want equal parts along dimension 0, so tokens come first and short parts are padded.
    tokens_first = x_BnD.transpose(0, 1)
    padded = F.pad(tokens_first, (0, 0, 0, 0, 0, sizes[0] - tokens_first.shape[0])).contiguous()
    out = padded.new_empty(shard.size * sizes[0], *padded.shape[1:])
    dist.all_gather_into_tensor(out, padded, group=shard.group)
    parts = [out.narrow(0, i * sizes[0], size) for i, size in enumerate(sizes)]
    whole = out if sizes[0] == sizes[-1] else torch.cat(parts)
    return whole.transpose(0, 1)


def _reduce_scatter(x_BND: Tensor, shard: TokenShard) -> Tensor:
    sizes = part_sizes(x_BND.shape[1], shard.size)
    tokens_first = x_BND.transpose(0, 1)
    if sizes[0] != sizes[-1]:
        parts = [F.pad(p, (0, 0, 0, 0, 0, sizes[0] - len(p))) for p in tokens_first.split(sizes)]
        tokens_first = torch.cat(parts)
    tokens_first = tokens_first.contiguous()
    out = tokens_first.new_empty(sizes[0], *tokens_first.shape[1:])
    dist.reduce_scatter_tensor(out, tokens_first, group=shard.group)
    return out.narrow(0, 0, sizes[shard.rank]).transpose(0, 1)


def encode_shared(encode: Callable[[Any], Tensor], items: Any, count: int, shard: TokenGroup) -> Tensor:
    """Encode ``count`` items once per tp group: each rank its part, then features ``(count, ...)`` on all."""
    sizes = part_sizes(count, shard.size)
    start = sum(sizes[: shard.rank])
    # A rank without items of its own still joins the collective, with somebody else's.
    mine = items[start : start + sizes[shard.rank]] if sizes[shard.rank] else items[:1]
    part = encode(mine)
    padded = F.pad(part, [0, 0] * (part.ndim - 1) + [0, sizes[0] - len(part)]).contiguous()
    out = padded.new_empty(shard.size * len(padded), *padded.shape[1:])
    dist.all_gather_into_tensor(out, padded, group=shard.group)
    return torch.cat([out.narrow(0, i * len(padded), size) for i, size in enumerate(sizes)])

"""Sequence parallelism: tokens sharded over a tp group, and the collectives that move them.

A sequence of N tokens is cut into consecutive parts that differ by at most one token. Gather and reduce-scatter
are each other's adjoint: each rank's graph computes the gradient of its own part of the loss, and gradients of
replicated weights are summed over tp.

Shape letters: B batch, N tokens, n tokens of this rank, D any width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deco_scale.models.compile import outside_graphs
from deco_scale.models.tp_plan import part_sizes
from deco_scale.objectives.objective import Tokens

TensorFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TokenShard(Tokens):
    """A tp group, and this rank's tokens in it."""

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
        """This rank's share of ``count`` tokens; the shares of a group sum to one."""
        return part_sizes(count, self.size)[self.rank] / count

    @outside_graphs
    def gather(self, x_BnD: Tensor, count: int) -> Tensor:
        """All tokens ``(B, N, D)`` on every rank; backward sums each token's gradient on its own rank."""
        gather, scatter = partial(_all_gather, count=count, shard=self), partial(_reduce_scatter, shard=self)
        return _WithAdjoint.apply(x_BnD, gather, scatter)  # type: ignore[no-any-return]

    @outside_graphs
    def scatter_sum(self, x_BND: Tensor) -> Tensor:
        """This rank's tokens of the sum of the ranks' partial results; backward gathers."""
        gather = partial(_all_gather, count=x_BND.shape[1], shard=self)
        return _WithAdjoint.apply(x_BND, partial(_reduce_scatter, shard=self), gather)  # type: ignore[no-any-return]


class _WithAdjoint(torch.autograd.Function):
    """``function`` of ``x``, whose gradient goes through ``adjoint``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: TensorFn, adjoint: TensorFn) -> Tensor:
        ctx.adjoint = adjoint
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(grad), None, None


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """Zeros after the last row, up to ``rows``."""
    return F.pad(x, [0, 0] * (x.ndim - 1) + [0, rows - len(x)])


def _gather_rows(part: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All ranks' parts along dimension 0, of ``sizes`` rows; padded, since collectives need equal parts."""
    padded = _pad_rows(part, sizes[0]).contiguous()
    out = padded.new_empty(len(sizes) * sizes[0], *padded.shape[1:])
    dist.all_gather_into_tensor(out, padded, group=group)
    if sizes[0] == sizes[-1]:
        return out
    return torch.cat([out.narrow(0, i * sizes[0], size) for i, size in enumerate(sizes)])


def _all_gather(x_BnD: Tensor, count: int, shard: TokenShard) -> Tensor:
    return _gather_rows(x_BnD.transpose(0, 1), part_sizes(count, shard.size), shard.group).transpose(0, 1)


def _reduce_scatter(x_BND: Tensor, shard: TokenShard) -> Tensor:
    sizes = part_sizes(x_BND.shape[1], shard.size)
    x_NBD = x_BND.transpose(0, 1)
    if sizes[0] != sizes[-1]:
        x_NBD = torch.cat([_pad_rows(part, sizes[0]) for part in x_NBD.split(sizes)])
    x_NBD = x_NBD.contiguous()
    out = x_NBD.new_empty(sizes[0], *x_NBD.shape[1:])
    dist.reduce_scatter_tensor(out, x_NBD, group=shard.group)
    return out.narrow(0, 0, sizes[shard.rank]).transpose(0, 1)


def encode_shared(encode: Callable[[Any], Tensor], items: Any, shard: TokenShard) -> Tensor:
    """Encode items once per tp group, each rank a part; all ranks get the features ``(len(items), ...)``."""
    sizes = part_sizes(len(items), shard.size)
    start, size = sum(sizes[: shard.rank]), sizes[shard.rank]
    # A rank without items encodes the first, to join the collective with the right shape.
    part = encode(items[start : start + size] if size else items[:1])
    return _gather_rows(part, sizes, shard.group)

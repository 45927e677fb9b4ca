"""Sequence parallelism: tokens sharded over a tp group, and the collectives that move them.

A sequence of N tokens is cut into consecutive parts that differ by at most one token. Gather and reduce-scatter
are each other's adjoint: each rank's graph computes the gradient of its own part of the loss, and gradients of
replicated weights are summed over tp.

Both collectives move whole rows, so tokens should lie in memory as (N, B, D) whatever their shape: then neither
copies anything. They are functional collectives, which ``torch.compile`` traces.

Shape letters: B batch, N tokens, n tokens of this rank, D any width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deco_scale.models.tp_plan import part_sizes
from deco_scale.objectives.objective import Tokens

_COLLECTIVES = torch.ops._c10d_functional


@dataclass(frozen=True)
class TokenShard(Tokens):
    """A tp group, and this rank's tokens in it."""

    group: dist.ProcessGroup
    # Plain values, which compiled blocks can read.
    rank: int = field(init=False)
    size: int = field(init=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        values = {"rank": self.group.rank(), "size": self.group.size(), "name": self.group.group_name}
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def own(self, x_BND: Tensor) -> Tensor:
        """This rank's tokens ``(B, n, D)`` of a replicated sequence; no communication."""
        sizes = part_sizes(x_BND.shape[1], self.size)
        return x_BND.narrow(1, sum(sizes[: self.rank]), sizes[self.rank])

    def share(self, count: int) -> float:
        """This rank's share of ``count`` tokens; the shares of a group sum to one."""
        return part_sizes(count, self.size)[self.rank] / count

    def gather(self, x_BnD: Tensor, count: int) -> Tensor:
        """All tokens ``(B, N, D)`` on every rank; backward sums each token's gradient on its own rank."""
        sizes = part_sizes(count, self.size)
        return _Gather.apply(x_BnD.transpose(0, 1), sizes, self.rank, self.name).transpose(0, 1)  # type: ignore[no-any-return]

    def scatter_sum(self, x_BND: Tensor) -> Tensor:
        """This rank's tokens of the sum of the ranks' partial results; backward gathers."""
        sizes = part_sizes(x_BND.shape[1], self.size)
        return _ScatterSum.apply(x_BND.transpose(0, 1), sizes, self.rank, self.name).transpose(0, 1)  # type: ignore[no-any-return]

    def with_own_communicator(self) -> "TokenShard":
        """The same ranks in a new group, whose collectives are not queued behind this one's; all ranks call it."""
        group, _ = dist.new_subgroups(self.size)
        return TokenShard(group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_nBD: Tensor, sizes: Sequence[int], rank: int, group: str) -> Tensor:
        ctx.sizes, ctx.rank, ctx.group = sizes, rank, group
        return _gather_rows(part_nBD, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad_NBD: Tensor) -> tuple[Tensor, None, None, None]:
        return _reduce_scatter_rows(grad_NBD, ctx.sizes, ctx.rank, ctx.group), None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial_NBD: Tensor, sizes: Sequence[int], rank: int, group: str) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _reduce_scatter_rows(partial_NBD, sizes, rank, group)

    @staticmethod
    def backward(ctx: Any, grad_nBD: Tensor) -> tuple[Tensor, None, None, None]:
        return _gather_rows(grad_nBD, ctx.sizes, ctx.group), None, None, None


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """Zeros after the last row, up to ``rows``."""
    return F.pad(x, [0, 0] * (x.ndim - 1) + [0, rows - len(x)]) if len(x) < rows else x


def _gather_rows(part: Tensor, sizes: Sequence[int], group: str) -> Tensor:
    """All ranks' parts along dimension 0, of ``sizes`` rows; padded, since collectives need equal parts."""
    padded = _pad_rows(part, sizes[0]).contiguous()
    out = _COLLECTIVES.wait_tensor(_COLLECTIVES.all_gather_into_tensor(padded, len(sizes), group))
    if sizes[0] == sizes[-1]:
        return out  # type: ignore[no-any-return]
    return torch.cat([out.narrow(0, i * sizes[0], size) for i, size in enumerate(sizes)])


def _reduce_scatter_rows(x: Tensor, sizes: Sequence[int], rank: int, group: str) -> Tensor:
    """The sum over ranks of this rank's rows of dimension 0."""
    if sizes[0] != sizes[-1]:
        x = torch.cat([_pad_rows(part, sizes[0]) for part in x.split(list(sizes))])
    out = _COLLECTIVES.reduce_scatter_tensor(x.contiguous(), "sum", len(sizes), group)
    return _COLLECTIVES.wait_tensor(out).narrow(0, 0, sizes[rank])  # type: ignore[no-any-return]


def encode_shared(encode: Callable[[Any], Tensor], items: Any, shard: TokenShard) -> Tensor:
    """Encode items once per tp group, each rank a part; all ranks get the features ``(len(items), ...)``."""
    sizes = part_sizes(len(items), shard.size)
    start, size = sum(sizes[: shard.rank]), sizes[shard.rank]
    # A rank without items encodes the first, to join the collective with the right shape.
    part = encode(items[start : start + size] if size else items[:1])
    return _gather_rows(part, sizes, shard.name)

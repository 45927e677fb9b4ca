"""A digest of the weights' bits that does not depend on how they are sharded."""

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from deco_scale.checkpoint.staging import Snapshot, is_counted, local_part

_WEIGHTS = "model."


def parameter_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of the weights of a sharded state: the sum of 32-bit words per tensor. All ranks together."""
    names = sorted(n for n in state if n.startswith(_WEIGHTS))
    sums = torch.stack([_word_sum(local_part(state[n]), counted=is_counted(state[n])) for n in names])
    dist.all_reduce(sums)
    return _of_sums(names, sums)


def snapshot_digest(snapshot: Snapshot, group: dist.ProcessGroup | None) -> str:
    """The same digest of staged weights, reduced over ``group``."""
    names = sorted(n for n in snapshot.tensors if n.startswith(_WEIGHTS))
    sums = torch.stack([_word_sum(snapshot.tensors[n], counted=n in snapshot.counted) for n in names])
    dist.all_reduce(sums, group=group)
    return _of_sums(names, sums)


def _of_sums(names: list[str], sums: Tensor) -> str:
    parts = [f"{n}:{v}" for n, v in zip(names, sums.tolist(), strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _word_sum(local: Tensor, *, counted: bool) -> Tensor:
    """Wrapping sum of the 32-bit words that this rank alone contributes."""
    if not counted:
        return torch.zeros((), dtype=torch.int64, device=local.device)
    return local.float().contiguous().view(torch.int32).sum(dtype=torch.int64)

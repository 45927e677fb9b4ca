"""Detection of silent data corruption: tensors that ranks replicate are compared bit by bit.

A flipped bit of a weight raises no error anywhere: it spreads with the gradients and is saved in checkpoints.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deco_scale.distributed.collectives import gather_objects
from deco_scale.errors import ReplicaMismatch, ReplicaMismatchError


class Replicas(NamedTuple):
    """Tensors of this rank that must be the same, bit by bit, on all ranks of ``group``."""

    group: dist.ProcessGroup
    tensors: Mapping[str, Tensor]


def bit_digest(tensors: Sequence[Tensor]) -> Tensor:
    """One int64 per tensor, on the tensors' device, that any single flipped bit changes."""
    digests = [
        torch.hash_tensor(t.detach().contiguous())
        if t.numel()
        else torch.zeros((), dtype=torch.int64, device=t.device)
        for t in tensors
    ]
    return torch.stack([digest.view(torch.int64) for digest in digests])


def check_replicas(replicas: Sequence[Replicas], step: int, hosts: Sequence[str], last_good: int | None) -> None:
    """Compare replicas; a collective that waits for the device. ``hosts`` are the ranks' nodes.

    Raises :class:`ReplicaMismatchError` with ranks and hosts, on every rank. ``last_good`` is the step of the last
    comparison in this launch.
    """
    mine: list[ReplicaMismatch] = []
    for group, tensors in replicas:
        names = sorted(tensors)
        digests = bit_digest([tensors[name] for name in names])
        by_rank = [torch.zeros_like(digests) for _ in range(dist.get_world_size(group))]
        dist.all_gather(by_rank, digests, group=group)
        mine += compare_digests(torch.stack(by_rank).cpu(), names, dist.get_process_group_ranks(group))
    found = {mismatch.rank: mismatch for part in gather_objects(mine) for mismatch in part}
    if not found:
        return
    mismatches = [found[rank] for rank in sorted(found)]
    where = "; ".join(f"rank {m.rank} on {hosts[m.rank]}: {m.count} tensors, first {m.first}" for m in mismatches)
    decided = all(m.has_majority for m in mismatches)
    who = "differs from the others" if decided else "they differ, either may be wrong"
    since = f"after step {last_good}" if last_good is not None else "at any step of this launch"
    raise ReplicaMismatchError(
        f"step {step}: replicated weights differ between ranks ({where}; {who}). A device or its memory is "
        f"faulty: take its node out of the job. It may have happened {since}: remove checkpoints from then "
        "on, or name an older one with --resume",
        mismatches,
    )


def compare_digests(rows: Tensor, names: Sequence[str], ranks: Sequence[int]) -> list[ReplicaMismatch]:
    """Ranks whose digests differ from the majority's; all of them where there is none.

    ``rows`` is (ranks, tensors).
    """
    differing: dict[int, list[str]] = {}
    has_majority = True
    for column, name in enumerate(names):
        digests = rows[:, column].tolist()
        if len(set(digests)) == 1:
            continue
        (common, votes), *_ = Counter(digests).most_common(1)
        decided = votes * 2 > len(digests)
        has_majority = has_majority and decided
        for rank, digest in zip(ranks, digests, strict=True):
            if not decided or digest != common:
                differing.setdefault(rank, []).append(name)
    return [ReplicaMismatch(rank, len(found), found[0], has_majority) for rank, found in differing.items()]

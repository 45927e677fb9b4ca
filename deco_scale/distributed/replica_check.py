"""Silent data corruption: what ranks hold alike is compared bit by bit.

A flipped bit in a weight is no error that anything else would notice: it travels with the gradients and is saved.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from deco_scale.distributed.collectives import gather_objects
from deco_scale.errors import RunError
from deco_scale.parallel.engines.base import Engine


@dataclass(frozen=True, slots=True)
class ReplicaMismatch:
    """A rank that differs from most of its group in ``count`` tensors, the ``first`` of them named.

    Not ``sure`` where there is no majority, as between two.
    """

    rank: int
    count: int
    first: str
    sure: bool


class ReplicaMismatchError(RunError):
    """Ranks hold different values where they must be alike."""

    def __init__(self, message: str, odd: Sequence[ReplicaMismatch]) -> None:
        super().__init__(message)
        self.odd = tuple(odd)


def bit_digest(tensors: Sequence[Tensor]) -> Tensor:
    """One number (int64) per tensor that any single flipped bit changes; on the tensors' device."""
    digests = [torch.hash_tensor(t.detach().contiguous()) if t.numel() else _nothing(t) for t in tensors]
    return torch.stack([d.view(torch.int64) for d in digests])


def _nothing(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=like.device)


def find_mismatches(engine: Engine) -> list[ReplicaMismatch]:
    """Compare replicas; all ranks together, all get the same answer. Waits for the device."""
    mine: list[ReplicaMismatch] = []
    differs, device = False, torch.device("cpu")
    for replicas in engine.replicas():
        names = sorted(replicas.tensors)
        own = bit_digest([replicas.tensors[name] for name in names])
        device = own.device
        every = [torch.zeros_like(own) for _ in range(dist.get_world_size(replicas.group))]
        dist.all_gather(every, own, group=replicas.group)
        rows = torch.stack(every)
        if bool((rows != rows[0]).any()):
            differs = True
            mine += _odd_of(rows.cpu(), names, dist.get_process_group_ranks(replicas.group))
    flag = torch.tensor(float(differs), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    if not float(flag):
        return []
    by_rank = {odd.rank: odd for part in gather_objects(mine) for odd in part}
    return [by_rank[rank] for rank in sorted(by_rank)]


def _odd_of(rows: Tensor, names: Sequence[str], ranks: Sequence[int]) -> list[ReplicaMismatch]:
    """Of digests ``rows`` (ranks, tensors): who differs from the majority; everybody where there is none."""
    counts: Counter[int] = Counter()
    first: dict[int, str] = {}
    sure = True
    for column, name in enumerate(names):
        values = rows[:, column].tolist()
        if len(set(values)) == 1:
            continue
        (value, most), *_ = Counter(values).most_common(1)
        decided = most * 2 > len(values)
        sure = sure and decided
        for rank, found in zip(ranks, values, strict=True):
            if not decided or found != value:
                counts[rank] += 1
                first.setdefault(rank, name)
    return [ReplicaMismatch(rank, counts[rank], first[rank], sure) for rank in counts]


class ReplicaCheck:
    """The comparison every ``every`` steps (0: never); ``hosts`` are the ranks' nodes."""

    def __init__(self, every: int, hosts: Sequence[str]) -> None:
        self._every, self._hosts = every, hosts
        self._last_good: int | None = None

    def check(self, engine: Engine, step: int) -> None:
        """Where it is time, all ranks together; raises :class:`ReplicaMismatchError` that names rank, host and tensors."""
        if not self._every or step % self._every:
            return
        odd = find_mismatches(engine)
        if not odd:
            self._last_good = step
            return
        named = "; ".join(
            f"rank {o.rank} on {self._hosts[o.rank]}: {o.count} tensors, first {o.first}" for o in odd
        )
        who = "differs from the others" if all(o.sure for o in odd) else "they differ, either may be wrong"
        since = f"after step {self._last_good}" if self._last_good is not None else "at any step of this launch"
        raise ReplicaMismatchError(
            f"step {step}: weights that ranks hold alike are not the same ({named}; {who}). A device or its "
            f"memory is faulty: take its node out of the job. It may have happened {since}: remove checkpoints "
            "from then on, or name an older one by --resume",
            odd,
        )

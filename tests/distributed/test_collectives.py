"""Collectives over objects: what two processes get, and that an error of one is raised by both."""

from pathlib import Path

import pytest
import torch.distributed as dist

from deco_scale.distributed.collectives import broadcast_object, gather_objects, raise_together, run_on_rank_zero
from deco_scale.errors import Damaged, RunError
from tests.support.process_groups import in_group


def _fail() -> None:
    raise Damaged("shard 3 is incomplete")


def _check() -> None:
    rank = dist.get_rank()
    assert gather_objects(rank) == [0, 1]
    assert broadcast_object(rank + 7) == 7
    assert run_on_rank_zero(lambda: rank) == 0
    with pytest.raises(Damaged, match="^rank 1: shard 3 is incomplete$"):
        raise_together(_fail if rank == 1 else lambda: None)
    with pytest.raises(Damaged, match="^shard 3 is incomplete$"):
        run_on_rank_zero(_fail)
    if rank == 1:
        with pytest.raises(RunError):
            raise_together(lambda: (_ for _ in ()).throw(RunError("disk")))
    else:
        with pytest.raises(RunError, match="^rank 1: disk$"):
            raise_together(lambda: None)


def test_values_are_shared_and_every_rank_raises_the_first_error(tmp_path: Path) -> None:
    in_group(_check, 2, tmp_path)

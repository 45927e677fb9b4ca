"""Collectives over objects without a process group; tests/distributed/test_collectives.py has two processes."""

import pytest
import torch.distributed as dist

from deco_scale.distributed.collectives import (
    broadcast_object,
    gather_objects,
    raise_together,
    run_on_rank_zero,
    sum_counters,
)
from deco_scale.errors import Damaged


def test_without_a_process_group_there_is_one_rank() -> None:
    def fail() -> None:
        raise Damaged("shard 3 is incomplete")

    assert not dist.is_initialized()
    assert gather_objects("a") == ["a"]
    assert broadcast_object("a") == raise_together(lambda: "a") == run_on_rank_zero(lambda: "a") == "a"
    with pytest.raises(Damaged, match="^shard 3 is incomplete$"):
        raise_together(fail)


def test_counters_are_added_by_name() -> None:
    assert sum_counters([{"bad": 1}, {"bad": 2, "small": 0}]) == {"bad": 3, "small": 0}

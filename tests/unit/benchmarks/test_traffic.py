"""The count of a block's memory traffic: right for operations that one can count by hand; the fusions' promise."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks.traffic import Traffic, TrafficCounter, total


def test_bytes_of_small_operations_are_counted_once_each() -> None:
    counter = TrafficCounter()
    x, weight = torch.ones(4, 8, requires_grad=True), torch.ones(3, 8)
    with counter.passing("forward"):
        # A view and memory without values count nothing, an expanded row counts once.
        out = F.linear(x.view(2, 2, 8).flatten(0, 1), weight) + torch.ones(3).expand(4, 3)
        out.detach().mul_(2.0)
        torch.empty(100)
    with counter.passing("backward"):
        out.backward(torch.ones(4, 3))
    forward, backward = counter.counts["forward"], counter.counts["backward"]
    assert forward.pop("ones") == Traffic(1, 0, 3 * 4)
    assert forward == {
        "mm": Traffic(1, (32 + 24) * 4, 12 * 4),
        "add": Traffic(1, (12 + 3) * 4, 12 * 4),
        "mul_": Traffic(1, 12 * 4, 12 * 4),
    }
    assert backward.pop("ones") == Traffic(1, 0, 12 * 4)
    assert backward == {"mm": Traffic(1, (12 + 24) * 4, 32 * 4)}
    assert total(counter.counts, "GEMM") == (56 + 12 + 36 + 32) * 4
    assert total(counter.counts) == (27 + 24) * 4


def test_counter_sees_parameters_of_modules() -> None:
    counter = TrafficCounter()
    norm = nn.LayerNorm(8)
    with counter.passing("forward"):
        norm(torch.ones(2, 8))
    assert counter.counts["forward"]["native_layer_norm"] == Traffic(1, (16 + 8 + 8) * 4, (16 + 2 + 2) * 4)

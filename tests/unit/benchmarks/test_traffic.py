"""The count of a block's memory traffic: right for operations that one can count by hand; the fusions' promise."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks.traffic import CONFIG, LEAST_SAVED, Traffic, TrafficCounter, count_block, saved, total
from deco_scale.config import load_config


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


def test_fused_block_moves_at_least_35_percent_less_at_the_shapes_of_the_xxl() -> None:
    cfg = load_config(CONFIG, [])
    assert LEAST_SAVED == 0.35
    for stage in cfg.stages:
        tokens = (stage.resolution // cfg.model.patch_size) ** 2
        before, after = (
            count_block(cfg.model, batch=stage.micro_batch, tokens=tokens, fused=fused) for fused in (False, True)
        )
        assert saved(before, after) >= LEAST_SAVED
        # None of what the fusions replace is left.
        names = {name for one in after.values() for name in one}
        assert not names & {"stack", "silu", "norm_rotate"}
        # The same products, in fewer GEMMs: only what gate and up read, and the sum of their gradients, is saved.
        assert total(after, "attention") == total(before, "attention")
        assert 0.9 < total(after, "GEMM") / total(before, "GEMM") <= 1.0


def test_counter_sees_parameters_of_modules() -> None:
    counter = TrafficCounter()
    norm = nn.LayerNorm(8)
    with counter.passing("forward"):
        norm(torch.ones(2, 8))
    assert counter.counts["forward"]["native_layer_norm"] == Traffic(1, (16 + 8 + 8) * 4, (16 + 2 + 2) * 4)

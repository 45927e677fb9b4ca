"""Per-block compile leaves the trace as it is, under both engines."""

from pathlib import Path
from typing import Any

import pytest

from tests.assets import tiny_config
from tests.distributed.harness import Job, run_jobs, trace, worst_difference

TOLERANCE = 1e-5
"""Relative, fp32: fused kernels change the order of operations only."""


@pytest.mark.long
@pytest.mark.parametrize(
    "parallel",
    [
        {"engine": "fsdp"},
        {"engine": "fsdp", "tp": 2},
        {"engine": "fsdp", "tp": 2, "activation_checkpointing": "full"},
        {"engine": "deepspeed", "zero_stage": 3},
    ],
    ids=["fsdp", "tp", "tp_recomputed", "zero3"],
)
def test_compiled_blocks_follow_the_eager_trace(
    parallel: dict[str, Any], tmp_path: Path, shards: Path, text_encoder: Path
) -> None:
    def job(name: str, compiled: bool) -> Job:
        config = tiny_config(tmp_path / name, shards, text_encoder)
        return Job(name, config | {"parallel": parallel, "compile": compiled})

    run_jobs([job("eager", False), job("compiled", True)], 2, tmp_path)
    found = trace(tmp_path / "compiled")
    assert len(found) == 12
    assert worst_difference(found, trace(tmp_path / "eager")) < TOLERANCE

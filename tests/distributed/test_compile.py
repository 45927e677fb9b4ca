"""Per-block compile leaves the trace as it is, under both engines."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deco_scale.models import compile
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.precision.config import PrecisionConfig
from tests.support.assets import tiny_config
from tests.support.process_groups import Job, in_group, run_jobs, trace, worst_difference

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


def _zero3_past_the_limit() -> None:
    from deco_scale.parallel.engines.base import EngineSettings
    from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine
    from tests.distributed.test_communication import _build, _step

    compile.RECOMPILE_LIMIT = 1
    # Traced and run as it is.
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="eager")  # type: ignore[assignment]
    engine = DeepSpeedEngine(
        _build,
        EngineSettings(
            dims=ParallelDims(1, 1, 1),
            device=torch.device("cpu"),
            optimizer=OptimizerConfig(),
            precision=PrecisionConfig(compute="fp32"),
            compile_blocks=True,
            micro_batch=2,
            overrides={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        ),
    )
    _step(engine)
    assert engine.optimizer_steps == 1


def test_zero3_goes_on_past_the_limit_of_graphs(tmp_path: Path) -> None:
    """DeepSpeed's hooks are traced with the blocks and make graphs for each module: 16 blocks need over 64."""
    in_group(_zero3_past_the_limit, 1, tmp_path)

"""Per-block compile leaves the trace as it is, under both engines, and makes two graphs for each kind of block."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.compile import drop_graphs
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.engines.base import Engine, EngineSettings
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.precision.config import Compute, PrecisionConfig
from deco_scale.precision.fp8_plan import BatchShape, plan_fp8
from deco_scale.precision.recipe import Fp8Choice
from tests.support.assets import tiny_config
from tests.support.process_groups import Job, in_group, run_jobs, trace, worst_difference

MODEL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=2, num_blocks=3, num_text_blocks=2, patch_size=8, decoder_width=8,
    decoder_blocks=1, text_dim=16, text_tokens=8,
)  # fmt: skip
TOLERANCE = 1e-5
"""Relative, fp32: fused kernels change the order of operations only."""


@pytest.mark.long
@pytest.mark.parametrize(
    "parallel",
    [
        {"engine": "fsdp"},
        {"engine": "fsdp", "tp": 2},
        {"engine": "fsdp", "tp": 2, "activation_checkpointing": "full"},
        {"engine": "fsdp", "tp": 2, "activation_checkpointing": "selective"},
        {"engine": "deepspeed", "zero_stage": 3},
        {"engine": "deepspeed", "zero_stage": 3, "tp": 2},
    ],
    ids=["fsdp", "tp", "tp_recomputed", "tp_selective", "zero3", "zero3_tp"],
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


def _build() -> Objective:
    return Objective(Denoiser(MODEL), ObjectiveConfig(repa_weight=0.0), encoder_dim=0)


def _count_graphs(cases: list[tuple[str, Compute]]) -> None:
    real = torch.compile
    for engine_name, compute in cases:
        graphs: list[Any] = []

        def backend(module: torch.fx.GraphModule, examples: list[Any], graphs: list[Any] = graphs) -> Any:
            graphs.append(module)
            return module.forward

        torch.compile = functools.partial(real, backend=backend)
        precision = PrecisionConfig(compute=compute, fp8_emulate=compute == "fp8")
        shapes = [BatchShape(batch=2, image_tokens=16, text_tokens=8)]
        choice = Fp8Choice("torchao", "current", emulate=True)
        plan = plan_fp8(MODEL, precision, choice, tp=2, batches=shapes, recompute="none", compile_blocks=True)
        settings = EngineSettings(
            dims=ParallelDims(1, 1, 2), device=torch.device("cpu"), optimizer=OptimizerConfig(),
            precision=precision, fp8_plan=plan if compute == "fp8" else None, compile_blocks=True, micro_batch=2,
        )  # fmt: skip
        engine: Engine
        if engine_name == "fsdp":
            from deco_scale.parallel.engines.fsdp import FsdpEngine

            engine = FsdpEngine(_build, settings)
        else:
            from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine

            engine = DeepSpeedEngine(_build, settings)
        # fsdp compiles the decoder as well.
        kinds = 3 if engine_name == "fsdp" else 2
        for number, side in enumerate((32, 64)):
            image = torch.randn(2, 3, side, side)
            inputs = ObjectiveInputs(image, image, torch.rand(2), torch.randn(2, 8, 16), None)
            for _ in range(2):
                engine.forward_backward(inputs, scale=1.0, last=True)
                engine.update(lr=1e-3, betas=(0.9, 0.95))
            assert len(graphs) == (2 * number + 1) * kinds
            grid = (side // 8, side // 8)
            patches = torch.randn(2, grid[0] * grid[1], MODEL.patch_values)
            engine.predict(patches, torch.rand(2), torch.randn(2, 8, 16), grid)
            assert len(graphs) == (2 * number + 2) * kinds
            # As at the end of a stage.
            drop_graphs()


def test_blocks_under_tp_share_two_graphs_a_stage(tmp_path: Path) -> None:
    """Without a graph break, which would be an error: collectives, Megatron's linears and FP8 are traced."""
    # ZeRO-3 comes last: an engine leaves its hooks in torch.
    in_group(_count_graphs, 2, tmp_path, [("fsdp", "bf16"), ("fsdp", "fp8"), ("zero3", "bf16")])

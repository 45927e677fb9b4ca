"""The planner over layouts, batches and links: what it takes, and how memory and time go with them."""

import itertools
from typing import Any

import pytest

from deco_scale.config import load_config
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.models.tp_plan import check_tp
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.mesh import ParallelDims, accumulation_steps, resolve_parallel_dims
from deco_scale.planning.comms import Traffic, seconds_of
from deco_scale.planning.flops import TrainStep, Workload
from deco_scale.planning.forecast import all_plans, forecast_stage, recommend
from deco_scale.planning.hardware import GPUS, gpu_device, gpu_named
from deco_scale.planning.layouts import enumerate_layouts
from deco_scale.planning.memory import memory_by_part
from deco_scale.planning.step_time import step_by_part
from deco_scale.training.config import StageConfig
from tests.support import CONFIGS

XXL = CONFIGS / "t2i_xxl.yaml"


def _any(parallel: ParallelConfig) -> None:
    """Takes every layout."""


def _stage(**changes: Any) -> StageConfig:
    settings: dict[str, Any] = {"name": "s", "resolution": 256, "steps": 10, "global_batch": 64, "micro_batch": 4}
    return StageConfig(lr=1e-4, **{**settings, **changes})


def _step(work: Workload, parallel: ParallelConfig, dims: ParallelDims, micro_batch: int = 4) -> TrainStep:
    return TrainStep(
        work=work, parallel=parallel, dims=dims, micro_batch=micro_batch, accumulation=2, resolution=256
    )


@pytest.mark.parametrize("gpus", [1, 6, 8, 16])
def test_every_layout_is_one_that_a_run_accepts(gpus: int) -> None:
    model, device = load_config(XXL).model, gpu_device("h100", compute="bf16")
    stages = (_stage(global_batch=48), _stage(name="t", resolution=512, global_batch=96))
    layouts = list(enumerate_layouts(model, gpus, check=_any))
    assert len(layouts) == len(set(map(repr, layouts)))
    plans = all_plans(Workload(model=model, compute="bf16"), stages, layouts, device, gpus=gpus)
    for plan in plans:
        dims = resolve_parallel_dims(plan.parallel, gpus)
        assert dims.dp * dims.tp == gpus and dims.tp <= 8
        check_tp(model, dims.tp)
        for forecast in plan.stages:
            steps = accumulation_steps(
                global_batch=forecast.stage.global_batch,
                micro_batch=forecast.stage.micro_batch,
                dp=dims.dp,
                where="here",
            )
            assert steps == forecast.accumulation
    best = recommend(plans, device)
    assert device.fits(best.memory_bytes)
    assert best.seconds == min(p.seconds for p in plans if device.fits(p.memory_bytes))
    assert {p.parallel.engine for p in plans} == {"fsdp", "deepspeed"}


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("tp", [1, 2])
def test_more_gpus_never_need_more_memory(engine: Any, tp: int) -> None:
    work = Workload(model=load_config(XXL).model, compute="bf16")
    for stage in (1, 2, 3):
        sizes = []
        for gpus in (2, 4, 8, 16, 64):
            parallel = ParallelConfig(engine=engine, zero_stage=stage, tp=tp)
            dims = resolve_parallel_dims(parallel, gpus)
            sizes.append(sum(memory_by_part(_step(work, parallel, dims), kind="cuda").values()))
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("fused", [False, True])
def test_bigger_batches_never_take_less(mode: ActivationCheckpointing, fused: bool) -> None:
    work = Workload(model=load_config(XXL).model, compute="bf16", fused=fused)
    device, parallel = gpu_device("h100", compute="bf16"), ParallelConfig(activation_checkpointing=mode)
    dims, sizes = resolve_parallel_dims(parallel, 16), (1, 2, 4, 8, 16, 64)
    steps = [_step(work, parallel, dims, micro_batch=size) for size in sizes]
    seconds = [sum(step_by_part(step, device).values()) for step in steps]
    memory = [sum(memory_by_part(step, kind="cuda").values()) for step in steps]
    # Where the host is the limit all take the same time, but for the last digit of a sum of parts.
    assert all(later >= earlier * (1 - 1e-12) for earlier, later in itertools.pairwise(seconds))
    assert memory == sorted(memory)
    # Enough for the host not to be the limit: time grows with the batch.
    assert seconds[-1] > 3 * seconds[-2]


def test_recomputation_trades_time_for_memory() -> None:
    work, device = Workload(model=load_config(XXL).model, compute="bf16"), gpu_device("h100", compute="bf16")
    stage = _stage(micro_batch=16, global_batch=128)
    found = [
        forecast_stage(work, stage, ParallelConfig(activation_checkpointing=mode), device, gpus=8)
        for mode in ("none", "selective", "full")
    ]
    memory, seconds = [f.memory_bytes for f in found], [f.step_s for f in found]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 3
    assert seconds == sorted(seconds) and len(set(seconds)) == 3


def test_links_are_as_fast_as_the_slower_of_node_and_network() -> None:
    device = gpu_device("h100", compute="bf16", network_gbps=400)
    line = Traffic("weights", "all-gather", "dp_shard", 10**9)
    inside = seconds_of(line, ParallelDims(1, 8), device)
    assert inside == pytest.approx(1e9 * 7 / 8 / (450e9 * 0.8))
    # Two nodes: half of it enters each through eight adapters.
    assert seconds_of(line, ParallelDims(1, 16), device) == pytest.approx(
        max(1e9 * 15 / 16 / (450e9 * 0.8), 1e9 / 2 / (8 * 50e9 * 0.8))
    )
    # One rank of each replica group in a node: one adapter.
    replicas = Traffic("gradients", "all-reduce", "dp_replicate", 10**9)
    assert seconds_of(replicas, ParallelDims(2, 8), device) == pytest.approx(2 * 1e9 / 2 / (50e9 * 0.8))
    slow = gpu_device("h100", compute="bf16", network_gbps=100)
    assert seconds_of(replicas, ParallelDims(2, 8), slow) == pytest.approx(4 * 2 * 1e9 / 2 / (50e9 * 0.8))
    assert seconds_of(line, ParallelDims(1, 1), device) == 0


def test_rates_say_whether_they_were_measured() -> None:
    assert gpu_device("h100", compute="bf16").figures[0] == "GEMM 798 TFLOP/s (measured: 8192^3 and copy)"
    assert gpu_device("h100", compute="bf16").gemm_flops == 798e12
    assert gpu_device("b200", compute="bf16").figures[0] == "GEMM 1,800 TFLOP/s (assumed: 80% of 2,250)"
    assert gpu_device("b200", compute="fp8").fp8_flops == 4.5e15 * 0.65
    assert gpu_named("NVIDIA H100 80GB HBM3") == "h100" and gpu_named("some processor") is None


def test_memory_of_every_gpu_of_the_table_is_used() -> None:
    """A GPU with more memory takes at least the micro-batch of a smaller one."""
    work = Workload(model=load_config(XXL).model, compute="bf16")
    layouts = [ParallelConfig(dp_shard=8)]
    largest = {}
    for gpu, sheet in GPUS.items():
        device = gpu_device(gpu, compute="bf16")
        plan = all_plans(work, [_stage(resolution=512, global_batch=4096)], layouts, device, gpus=8)[0]
        assert device.fits(plan.memory_bytes)
        largest[sheet.memory_bytes] = plan.memory_bytes
    assert [largest[m] for m in sorted(largest)] == sorted(largest.values())

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
from deco_scale.planning.forecast import (
    TIE,
    all_plans,
    forecast_stage,
    keeps_weights,
    plan_as_configured,
    recommend,
)
from deco_scale.planning.hardware import GPUS, gpu_device, gpu_named, peak_flops
from deco_scale.planning.layouts import enumerate_layouts
from deco_scale.planning.memory import memory_by_part
from deco_scale.planning.step_time import step_by_part
from deco_scale.planning.uncertainty import ASSUMPTIONS, PUBLISHED, compared, memory_range, step_range
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
    limit = (1 + TIE) * min(p.seconds for p in plans if device.fits(p.memory_bytes))
    assert best.seconds <= limit
    fitting = [p for p in plans if p.seconds <= limit and device.fits(p.memory_bytes)]
    assert best.host_seconds == min(p.host_seconds for p in fitting)
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


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_weights_stay_gathered_as_set_or_where_they_fit(engine: Any) -> None:
    work = Workload(model=load_config(XXL).model, compute="bf16")
    dims, stages = ParallelDims(1, 8), (_stage(), _stage(name="t", resolution=512))

    def kept(setting: Any, largest: float) -> bool:
        parallel = ParallelConfig(engine=engine, reshard_after_forward=setting)
        return keeps_weights(work, stages, parallel, dims, kind="cuda", fits=lambda needed: needed <= largest)

    def needed(setting: bool) -> float:
        parallel = ParallelConfig(engine=engine, reshard_after_forward=setting)
        steps = (TrainStep.of_stage(work, stage, parallel, dims) for stage in stages)
        return max(sum(memory_by_part(step, kind="cuda").values()) for step in steps)

    assert kept(False, 0.0) and not kept(True, 1e15)
    assert needed(False) > needed(True)
    # The stage that needs most decides.
    assert kept("auto", needed(False)) and not kept("auto", needed(False) - 1)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("fused", [False, True])
def test_bigger_batches_never_take_less(mode: ActivationCheckpointing, fused: bool) -> None:
    work = Workload(model=load_config(XXL).model, compute="bf16", fused=fused)
    device, parallel = gpu_device("h100", compute="bf16"), ParallelConfig(activation_checkpointing=mode)
    dims, sizes = resolve_parallel_dims(parallel, 16), (1, 2, 4, 8, 32, 128)
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


def test_a_range_holds_the_prediction_and_grows_with_what_is_unsure() -> None:
    work, device = Workload(model=load_config(XXL).model, compute="bf16"), gpu_device("h100", compute="bf16")
    widths = []
    for gpus in (8, 512):
        stage = _stage(micro_batch=1, global_batch=gpus)
        plan = plan_as_configured(work, [stage], ParallelConfig(), device, gpus=gpus)
        forecast = plan.stages[0]
        found = step_range(forecast, device)
        assert found.low_s < forecast.step_s < found.high_s
        assert set(found.slower_s) == {each.what for each in ASSUMPTIONS}
        low, high = memory_range(forecast)
        assert low < forecast.memory_bytes < high
        widths.append(found.slower_s["latency of collectives"])
    # With one image a GPU and 512 ranks latency is what counts.
    assert widths[1] > 10 * widths[0]


def test_an_mfu_above_all_published_ones_is_doubted() -> None:
    highest = max(each.high for each in PUBLISHED)
    assert "above every published" in compared(highest + 0.01)
    assert "above every published" not in compared(highest)
    assert "above none" in compared(0.05)


def test_over_many_ranks_gathers_that_are_fewer_and_within_a_node_pay() -> None:
    """512 ranks: a gather for each use of a unit costs latency, and between nodes more than inside of one."""
    work, device = Workload(model=load_config(XXL).model, compute="bf16"), gpu_device("h100", compute="bf16")
    stage = _stage(micro_batch=3, global_batch=1536)

    def seconds(**settings: Any) -> float:
        return forecast_stage(work, stage, ParallelConfig(**settings), device, gpus=512).step_s

    for engine in ("fsdp", "deepspeed"):
        assert seconds(engine=engine, reshard_after_forward=True) > 1.2 * seconds(engine=engine)
    within = {"dp_replicate": 64, "dp_shard": 8}
    assert seconds(reshard_after_forward=True) > 1.2 * seconds(reshard_after_forward=True, **within)
    # Four blocks are gathered at a time: a third as many calls have latency.
    assert seconds() > 1.1 * seconds(**within)


def test_links_are_as_fast_as_the_slower_of_node_and_network() -> None:
    device = gpu_device("h100", compute="bf16", network_gbps=400)
    line = Traffic("weights", "all-gather", "dp_shard", 10**9)
    call_s, link_s, network_s = device.latency
    inside = seconds_of(line, ParallelDims(1, 8), device)
    assert inside == pytest.approx(1e9 * 7 / 8 / (450e9 * 0.8) + call_s + 7 * link_s)
    # Two nodes: half of it enters each through eight adapters.
    assert seconds_of(line, ParallelDims(1, 16), device) == pytest.approx(
        max(1e9 * 15 / 16 / (450e9 * 0.8), 1e9 / 2 / (8 * 50e9 * 0.8)) + call_s + 14 * link_s + network_s
    )
    # The same bytes in ten calls have ten latencies.
    calls = line._replace(calls=10)
    assert seconds_of(calls, ParallelDims(1, 8), device) - inside == pytest.approx(9 * (call_s + 7 * link_s))
    # One rank of each replica group in a node: one adapter.
    replicas = Traffic("gradients", "all-reduce", "dp_replicate", 10**9)
    both = call_s + 2 * network_s
    assert seconds_of(replicas, ParallelDims(2, 8), device) == pytest.approx(2 * 1e9 / 2 / (50e9 * 0.8) + both)
    slow = gpu_device("h100", compute="bf16", network_gbps=100)
    assert seconds_of(replicas, ParallelDims(2, 8), slow) == pytest.approx(4 * 2 * 1e9 / 2 / (50e9 * 0.8) + both)
    # A tree over many nodes: its depth, not their number.
    tree = seconds_of(replicas._replace(bytes=0), ParallelDims(64, 8), device)
    assert tree == pytest.approx(call_s + 2 * 6 * network_s)
    assert seconds_of(line, ParallelDims(1, 1), device) == 0


def test_rates_say_whether_they_were_measured() -> None:
    assert gpu_device("h100", compute="bf16").figures[0] == "GEMM 798 TFLOP/s (measured: 8192^3 and copy)"
    assert gpu_device("h100", compute="bf16").gemm_flops == 798e12
    assert gpu_device("b200", compute="bf16").figures[0] == "GEMM 1,800 TFLOP/s (assumed: 80% of 2,250)"
    assert gpu_device("b200", compute="fp8").fp8_flops == 4.5e15 * 0.65
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA H20": "h20", "NVIDIA H800": "h800",
        "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "4090", "AMD Instinct MI300X": "mi300x", "some processor": None,
    }  # fmt: skip
    assert {name: gpu_named(name) for name in names} == names
    assert peak_flops("NVIDIA H800") == 989e12 and peak_flops("some processor") is None


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

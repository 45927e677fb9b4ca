"""How long the host takes to launch an XXL training step under FSDP2 and ZeRO-3, beside the step's wall time.

A job of ``benchmarks/gpu/second.py``, one for each engine, at world size 1 and accumulation 1: what the planner
needs to know of the host at micro-batches 3, 6 and 24, as on 512, 256 and 64 GPUs. No GPU has run it yet.

``host_forward_backward_s`` and ``host_update_s`` end when the engine's calls return; nothing waits for the device
but what the engine itself waits for (ZeRO-3 reads the gradient norm in its update). Where the device falls behind
by more launches than its queue holds (about a thousand), the host time is the device's: the small micro-batches
tell the host's own. On a CPU, host and device are the same.
"""

import math
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu.attention import attention_overrides, raced_attention
from benchmarks.gpu.sizes import one_stage
from benchmarks.host_time import HostTimed
from benchmarks.jobs.runner import CheckFailed, Found, Where
from benchmarks.measure import synchronise
from benchmarks.train.steps import TrainingSteps
from deco_scale.config import RunConfig, load_config
from deco_scale.distributed.bootstrap import Environment
from deco_scale.training.inputs import Batch, split

ENGINES = {
    "fsdp": ["parallel.engine=fsdp"],
    "zero3": ["parallel.engine=deepspeed", "parallel.zero_stage=3"],
}
MICRO_BATCHES, TINY_MICRO_BATCHES = (3, 6, 24), (1, 2)


def host_time(where: Where, *, engine: str) -> Found:
    """Wall time and host time of a step by micro-batch, and the share in which the device had nothing to do."""
    sizes = TINY_MICRO_BATCHES if where.quick else MICRO_BATCHES
    began = time.perf_counter()
    cfg = _config(where, engine, max(sizes))
    run = TrainingSteps(cfg, Environment(0, 1, 0), attention=raced_attention(where))
    where.write(
        "build", {"seconds": time.perf_counter() - began, "attention": [choice.line() for choice in run.attention]}
    )
    numbers: dict[str, Any] = {}
    try:
        batch, _ = run.next_batch()
        for size in sizes:
            part = next(split(batch, len(batch.sample_ids) // size))
            numbers[f"micro_{size}"] = measured = _measure(run, part, repeats=2 if where.quick else 5)
            where.write(f"micro_{size}", measured)
        if where.device == "cuda":
            # Last of all, with every figure on disk: the profiler is the most likely to fail.
            for size in sizes:
                part = next(split(batch, len(batch.sample_ids) // size))
                measured = numbers[f"micro_{size}"]
                measured |= _device_work(run, part, measured["step_s"])
                where.write(f"micro_{size}", measured)
    finally:
        run.close()
    return Found(f"{engine}: {'; '.join(_line(name, found) for name, found in numbers.items())}", numbers)


def _config(where: Where, engine: str, micro_batch: int) -> RunConfig:
    """One stage of the XXL recipe (of the tiny one, where sizes are small) with this micro-batch and engine."""
    name = "t2i_tiny.yaml" if where.quick else "t2i_xxl.yaml"
    settings = [
        *ENGINES[engine],
        *attention_overrides(where),
        # Each micro-batch would be compiled anew, which takes longer than the job may.
        "compile=false",
        f"device={where.device}",
        f"run.dir={where.out / 'run'}",
    ]
    cfg = load_config(record.ROOT / "configs" / name, settings)
    return one_stage(cfg, micro_batch=micro_batch, global_batch=micro_batch)


def _measure(run: TrainingSteps, batch: Batch, *, repeats: int) -> dict[str, Any]:
    """Medians over steps that begin on an idle device, and the time of a step in a series without waiting."""
    for _ in range(2):
        run.step(batch)
    timed, engine = HostTimed(run.engine), run.engine
    steps: list[dict[str, float]] = []
    run.engine = timed  # type: ignore[assignment]
    try:
        for _ in range(repeats):
            timed.forward_backward_s = timed.update_s = 0.0
            synchronise(run.device)
            began = time.perf_counter()
            result = run.step(batch)
            host_s = time.perf_counter() - began
            synchronise(run.device)
            steps.append(
                {
                    "wall_s": time.perf_counter() - began,
                    "host_s": host_s,
                    "host_forward_backward_s": timed.forward_backward_s,
                    "host_update_s": timed.update_s,
                }
            )
    finally:
        run.engine = engine
    began = time.perf_counter()
    for _ in range(repeats):
        result = run.step(batch)
    synchronise(run.device)
    step_s = (time.perf_counter() - began) / repeats
    loss = result.losses["loss"].item()
    if not math.isfinite(loss):
        raise CheckFailed(f"the loss is {loss} after steps of {len(batch.sample_ids)} images")
    medians = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    return {**medians, "step_s": step_s, "host_share": medians["host_s"] / medians["wall_s"], "loss": loss}


def _device_work(run: TrainingSteps, batch: Batch, step_s: float) -> dict[str, float]:
    """Kernels and copies of a step, the seconds in which any ran, and the share of a step in which none did."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.step(batch)
        synchronise(run.device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    if not spans:
        raise CheckFailed("the profiler saw nothing on the device; times of steps are in the parts")
    busy_s = covered(spans) / 1e6
    return {
        "device_operations": len(spans),
        "device_busy_s": busy_s,
        "launch_bound_share": max(0.0, 1 - busy_s / step_s),
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _line(name: str, found: dict[str, Any]) -> str:
    idle = f", device idle {found['launch_bound_share']:.0%}" if "launch_bound_share" in found else ""
    return f"{name} {1e3 * found['step_s']:.1f} ms, host {1e3 * found['host_s']:.1f} ms{idle}"

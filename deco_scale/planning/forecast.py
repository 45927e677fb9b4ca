"""Plans of a recipe on N GPUs: every layout that the engines accept, its memory, step time and cost, and the one
to take.

Differences below :data:`TIE` mean nothing for a prediction. Among micro-batches that close to the fastest the
largest is taken, among layouts the one with the least host time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from deco_scale.errors import ConfigError
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.mesh import ParallelDims, resolve_parallel_dims
from deco_scale.planning.flops import TrainStep, Workload, training_flops
from deco_scale.planning.hardware import MARGIN, Device
from deco_scale.planning.layouts import MAX_MICRO_BATCH, divisors
from deco_scale.planning.memory import memory_by_part
from deco_scale.planning.step_time import host_seconds, step_by_part
from deco_scale.training.config import StageConfig

HOUR_S, DAY_S = 3600.0, 86400.0
TIE = 0.02
"""Relative difference of predicted times that counts as none."""
HOST_SHARE = WAITING_SHARE = 0.5
"""Shares of a step from which a layout starves its GPUs: the host's time, the GPU's wait for host and network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageForecast:
    """One stage under one layout and micro-batch: bytes and seconds by part; rates follow from them.

    ``host_s``: what the host takes to launch a step, most of it while the GPU computes.
    """

    stage: StageConfig
    step: TrainStep
    image_flops: float
    memory: dict[str, float]
    seconds: dict[str, float]
    host_s: float

    @property
    def accumulation(self) -> int:
        return self.step.accumulation

    @property
    def host_share(self) -> float:
        """Host time over the step; 1 where the GPU waits for the host all the time."""
        return min(self.host_s / self.step_s, 1.0)

    @property
    def waiting_share(self) -> float:
        """Share of the step in which the GPU waits for the host or the network."""
        return (self.seconds["host"] + self.seconds["communication"]) / self.step_s

    @property
    def is_starved(self) -> bool:
        return self.host_share >= HOST_SHARE or self.waiting_share >= WAITING_SHARE

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def images_per_s(self) -> float:
        return self.stage.global_batch / self.step_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A layout with all stages of the recipe, in order."""

    parallel: ParallelConfig
    gpus: int
    stages: tuple[StageForecast, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(f.step_s * f.stage.steps for f in self.stages)

    @property
    def gpu_hours(self) -> float:
        return self.seconds / HOUR_S * self.gpus

    @property
    def memory_bytes(self) -> float:
        """Of the stage that needs most."""
        return max(f.memory_bytes for f in self.stages)

    @property
    def host_seconds(self) -> float:
        """Of all stages."""
        return sum(f.host_s * f.stage.steps for f in self.stages)

    @property
    def is_starved(self) -> bool:
        """Whether a stage's host time, or its wait for host and network, is at least half of its step."""
        return any(f.is_starved for f in self.stages)


def keeps_weights(
    work: Workload,
    stages: Iterable[StageConfig],
    parallel: ParallelConfig,
    dims: ParallelDims,
    *,
    kind: str,
    fits: Callable[[float], bool],
) -> bool:
    """Whether weights stay gathered over a step: as set, or for ``auto`` where they fit in every stage.

    ``kind`` is the device type of PyTorch; ``fits`` is asked about a rank's bytes.
    """
    if parallel.reshard_after_forward != "auto":
        return not parallel.reshard_after_forward
    kept = replace(parallel, reshard_after_forward=False)
    steps = (TrainStep.of_stage(work, stage, kept, dims) for stage in stages)
    return all(fits(sum(memory_by_part(step, kind=kind).values())) for step in steps)


def forecast_stage(
    work: Workload, stage: StageConfig, parallel: ParallelConfig, device: Device, *, gpus: int
) -> StageForecast:
    """Forecast with the stage's own micro-batch; raises :class:`ConfigError` where sizes do not divide."""
    dims = resolve_parallel_dims(parallel, gpus)
    kept = keeps_weights(work, (stage,), parallel, dims, kind=device.kind, fits=device.fits)
    step = TrainStep.of_stage(work, stage, replace(parallel, reshard_after_forward=not kept), dims)
    micro_s, update_s = host_seconds(step, device)
    return StageForecast(
        stage=stage,
        step=step,
        image_flops=training_flops(work.model, stage.resolution, stage.resolution),
        memory=memory_by_part(step, kind=device.kind),
        seconds=step_by_part(step, device),
        host_s=step.accumulation * micro_s + update_s,
    )


def plan_as_configured(
    work: Workload, stages: Iterable[StageConfig], parallel: ParallelConfig, device: Device, *, gpus: int
) -> Plan:
    """The plan with the micro-batches that the stages state, or that fit the number of ranks."""
    dims = resolve_parallel_dims(parallel, gpus)
    fitted = tuple(stage.fitted(dims.dp) for stage in stages)
    kept = keeps_weights(work, fitted, parallel, dims, kind=device.kind, fits=device.fits)
    parallel = replace(parallel, dp_shard=dims.dp_shard, reshard_after_forward=not kept)
    forecasts = tuple(forecast_stage(work, stage, parallel, device, gpus=gpus) for stage in fitted)
    return Plan(parallel=parallel, gpus=gpus, stages=forecasts)


def all_plans(
    work: Workload, stages: Sequence[StageConfig], layouts: Iterable[ParallelConfig], device: Device, *, gpus: int
) -> list[Plan]:
    """Plans of all layouts over which the global batches divide, fastest first, those that do not fit last.

    Each stage has the fastest micro-batch that fits (the largest of equals), or the smallest where none fits.
    Raises :class:`ConfigError` where no layout takes the global batches.
    """

    def fastest(stage: StageConfig, parallel: ParallelConfig, dp: int) -> StageForecast:
        sizes = [size for size in divisors(stage.global_batch // dp) if size <= MAX_MICRO_BATCH]
        forecasts = [
            forecast_stage(work, replace(stage, micro_batch=size), parallel, device, gpus=gpus) for size in sizes
        ]
        fitting = [f for f in forecasts if device.fits(f.memory_bytes)]
        if not fitting:
            return min(forecasts, key=lambda f: f.memory_bytes)
        limit = (1 + TIE) * min(f.step_s for f in fitting)
        return max((f for f in fitting if f.step_s <= limit), key=lambda f: f.stage.micro_batch)

    plans = []
    for parallel in layouts:
        dp = resolve_parallel_dims(parallel, gpus).dp
        if all(stage.global_batch % dp == 0 for stage in stages):
            chosen = tuple(fastest(stage, parallel, dp) for stage in stages)
            plans.append(Plan(parallel=parallel, gpus=gpus, stages=chosen))
    if not plans:
        batches = {stage.name: stage.global_batch for stage in stages}
        raise ConfigError(
            f"--gpus {gpus}: no layout takes the global batches {batches}; they must divide over the "
            "data-parallel ranks, which are the GPUs over tp"
        )
    return sorted(plans, key=lambda plan: (not device.fits(plan.memory_bytes), plan.seconds, plan.memory_bytes))


def recommend(plans: Sequence[Plan], device: Device) -> Plan:
    """The fastest plan that fits; of those within :data:`TIE` of it the one with the least host time.

    ``plans`` as :func:`all_plans` sorts them. If none fits, raises :class:`ConfigError` saying what the smallest
    one would need.
    """
    if device.fits(plans[0].memory_bytes):
        limit = (1 + TIE) * plans[0].seconds
        equal = [plan for plan in plans if plan.seconds <= limit and device.fits(plan.memory_bytes)]
        return min(equal, key=lambda plan: (plan.host_seconds, plan.seconds))
    smallest = min(plans, key=lambda plan: plan.memory_bytes)
    required, available = smallest.memory_bytes / 2**30, (device.memory_bytes or 0.0) / 2**30
    raise ConfigError(
        f"nothing fits on {smallest.gpus} x {device.name}: of {len(plans)} layouts the smallest needs "
        f"{required:.1f} GiB a GPU ({smallest.parallel.activation_checkpointing} activation checkpointing), and "
        f"there are {available:.1f} GiB, of which {MARGIN:.0%} stay free; take more GPUs, or another kind"
    )


def smallest_batches(work: Workload, plan: Plan, device: Device) -> tuple[StageConfig, ...] | None:
    """The plan's stages with the smallest global batches, in doublings, that starve no GPU.

    The layout stays, micro-batches grow, accumulation is 1 where the batch does. None where memory is full before.
    """
    dp, stages = resolve_parallel_dims(plan.parallel, plan.gpus).dp, []
    for forecast in plan.stages:
        stage, found = forecast.stage, forecast
        while found.is_starved:
            micro = 2 * found.stage.micro_batch
            stage = replace(stage, micro_batch=micro, global_batch=max(stage.global_batch, micro * dp))
            found = forecast_stage(work, stage, plan.parallel, device, gpus=plan.gpus)
            if micro > MAX_MICRO_BATCH or not device.fits(found.memory_bytes):
                return None
        stages.append(stage)
    return tuple(stages)

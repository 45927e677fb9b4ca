"""Measured training steps, and how far the prediction is from each of them."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig
from deco_scale.parallel.config import ParallelConfig
from deco_scale.planning.flops import IMAGE_ENCODER_DIM, Workload
from deco_scale.planning.forecast import StageForecast, forecast_stage
from deco_scale.planning.hardware import Ceiling, Device, gpu_device, gpu_named, measured_device
from deco_scale.training.config import StageConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One result file: what ran where, and what it took.

    ``peak_memory_bytes`` is what PyTorch allocated on a GPU, or a process's largest resident set, of which
    ``memory_before_bytes`` was there before the model. ``notes`` says what the prediction leaves out.
    """

    file: str
    date: str
    device_name: str
    work: Workload
    parallel: ParallelConfig
    world: int
    stage: StageConfig
    step_s: float
    peak_memory_bytes: float
    memory_before_bytes: float
    ceiling: Ceiling
    notes: tuple[str, ...]

    @property
    def gpu(self) -> str | None:
        """Key of the hardware table, None for a CPU or an unknown GPU."""
        return gpu_named(self.device_name)

    def device(self) -> Device:
        """What it ran on, by the ceilings that were measured beside it."""
        if self.gpu is None:
            return measured_device(self.device_name, self.ceiling)
        return gpu_device(self.gpu, compute=self.work.compute, measured=[self.ceiling])


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Prediction against one measurement; errors are shares of what was measured."""

    measured: Measured
    step_s: float
    memory_bytes: float

    @property
    def step_error(self) -> float:
        return self.step_s / self.measured.step_s - 1

    @property
    def memory_error(self) -> float:
        return self.memory_bytes / self.measured.peak_memory_bytes - 1


def read_results(folder: Path) -> tuple[list[Measured], int]:
    """Throughput measurements of ``folder`` by name, and how many files of another kind were skipped.

    Raises :class:`ConfigError` naming a file that is not JSON or lacks what it must have. A folder that is not
    there has no measurements.
    """
    results, skipped = [], 0
    for path in sorted(folder.glob("throughput_*.json")):
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(raw, dict):
                raise ValueError(f"expected an object, not {type(raw).__name__}")
            if raw.get("kind") != "throughput":
                skipped += 1
                continue
            results.append(_parse(path.name, raw))
        except KeyError as error:
            raise ConfigError(f"result file {path}: {error} is missing") from error
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(f"result file {path}: {error}") from error
    return results, skipped


def _positive(raw: dict[str, Any], name: str) -> float:
    value = raw[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a positive number")
    return float(value)


def _count(raw: dict[str, Any], name: str) -> int:
    value = _positive(raw, name)
    if value != int(value):
        raise ValueError(f"{name}={raw[name]!r} must be a whole number")
    return int(value)


def _parse(name: str, raw: dict[str, Any]) -> Measured:
    for key, known in (("compute", ("fp32", "bf16", "fp8")), ("kernels", ("triton", "torch"))):
        if raw[key] not in known:
            raise ValueError(f"{key}={raw[key]!r} is none of {known}")
    mesh, micro, world = raw["layout"], _count(raw, "micro_batch"), _count(raw, "world")
    sizes: dict[str, Any] = {axis: _count(mesh, axis) for axis in ("dp_replicate", "dp_shard", "tp")}
    accumulation = _count(raw, "accumulation")
    dp = sizes["dp_replicate"] * sizes["dp_shard"]
    if dp * sizes["tp"] != world:
        raise ValueError(f"layout={mesh} is not world={world}")
    stage = StageConfig(
        name=str(raw["config"]),
        resolution=_count(raw, "resolution"),
        steps=1,
        global_batch=micro * accumulation * dp,
        micro_batch=micro,
        lr=0.0,
    )
    work = Workload(
        model=ModelConfig(**raw["model"]),
        compute=raw["compute"],
        repa_dim=IMAGE_ENCODER_DIM if raw.get("repa") else 0,
        fused=raw["kernels"] == "triton",
        compile=bool(raw["compile"]),
    )
    work.model.grid(stage.resolution, stage.resolution)
    parallel = ParallelConfig(
        engine=raw["engine"],
        # fsdp has no ZeRO stage.
        zero_stage=3 if raw["zero_stage"] is None else raw["zero_stage"],
        activation_checkpointing=raw["activation_checkpointing"],
        **sizes,
    )
    return Measured(
        file=name,
        date=str(raw["date"]),
        device_name=str(raw["device"]),
        work=work,
        parallel=parallel,
        world=world,
        stage=stage,
        step_s=_positive(raw, "step_s"),
        peak_memory_bytes=_positive(raw, "peak_memory_bytes"),
        memory_before_bytes=float(raw.get("memory_before_bytes", 0)),
        ceiling=Ceiling(
            gemm_flops=_positive(raw, "gemm_tflops_per_s") * 1e12,
            copy_bytes_per_s=_positive(raw, "copy_gb_per_s") * 1e9,
            source=name,
        ),
        notes=("with encoders, which the prediction leaves out",) if raw.get("encoders") else (),
    )


def ceilings_of(measured: Sequence[Measured], gpu: str, compute: str) -> list[Ceiling]:
    """Ceilings measured on ``gpu`` in the number format whose GEMM is the ceiling of ``compute``."""
    fp32 = compute == "fp32"
    return [m.ceiling for m in measured if m.gpu == gpu and (m.work.compute == "fp32") == fp32]


def predict(measured: Measured) -> StageForecast:
    """The forecast for what ran."""
    return forecast_stage(measured.work, measured.stage, measured.parallel, measured.device(), gpus=measured.world)


def compare(measured: Measured) -> Comparison:
    """Prediction beside measurement; memory without the reserve, which is no part of what was measured."""
    forecast = predict(measured)
    memory = forecast.memory_bytes - forecast.memory["reserve"] + measured.memory_before_bytes
    return Comparison(measured=measured, step_s=forecast.step_s, memory_bytes=memory)


def median_errors(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """Medians of the absolute errors of step time and memory; raises ``ValueError`` without any."""
    errors = [(abs(c.step_error), abs(c.memory_error)) for c in comparisons]
    return statistics.median(step for step, _ in errors), statistics.median(memory for _, memory in errors)

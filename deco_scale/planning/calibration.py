"""Measured training steps, how far the prediction is from each of them, and measured rates of matrix products."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig
from deco_scale.parallel.config import ParallelConfig
from deco_scale.planning.flops import IMAGE_ENCODER_DIM, Workload
from deco_scale.planning.forecast import forecast_stage
from deco_scale.planning.gemm import LARGE, gemm_share
from deco_scale.planning.hardware import GPUS, Ceiling, Device, cpu_device, gpu_device, gpu_named
from deco_scale.training.config import StageConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One result file: what ran where, and what it took.

    ``gpu`` is the key of the hardware table, None for a CPU or an unknown GPU; ``device`` has the ``ceiling`` that
    was measured beside it. ``peak_memory_bytes`` is what PyTorch allocated on a GPU, or a process's largest
    resident set, of which ``memory_before_bytes`` was there before the model. ``encoders``: there were some, which
    the prediction leaves out.
    """

    file: str
    device_name: str
    gpu: str | None
    device: Device
    work: Workload
    parallel: ParallelConfig
    world: int
    stage: StageConfig
    step_s: float
    peak_memory_bytes: float
    memory_before_bytes: float
    ceiling: Ceiling
    encoders: bool


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
    if not (value := _positive(raw, name)).is_integer():
        raise ValueError(f"{name}={raw[name]!r} must be a whole number")
    return int(value)


def _parse(file: str, raw: dict[str, Any]) -> Measured:
    for key, known in (("compute", ("fp32", "bf16", "fp8")), ("kernels", ("triton", "torch"))):
        if raw[key] not in known:
            raise ValueError(f"{key}={raw[key]!r} is none of {known}")
    micro, world, resolution = (_count(raw, key) for key in ("micro_batch", "world", "resolution"))
    sizes: dict[str, Any] = {axis: _count(raw["layout"], axis) for axis in ("dp_replicate", "dp_shard", "tp")}
    if math.prod(sizes.values()) != world:
        raise ValueError(f"layout={raw['layout']} is not world={world}")
    batch = micro * _count(raw, "accumulation") * world // sizes["tp"]
    config = str(raw["config"])
    stage = StageConfig(name=config, resolution=resolution, steps=1, global_batch=batch, micro_batch=micro, lr=0.0)
    work = Workload(
        model=ModelConfig(**raw["model"]),
        compute=raw["compute"],
        repa_dim=IMAGE_ENCODER_DIM if raw.get("repa") else 0,
        fused=raw["kernels"] == "triton",
        compile=bool(raw["compile"]),
    )
    work.model.grid(resolution, resolution)
    parallel = ParallelConfig(
        engine=raw["engine"],
        # fsdp has no ZeRO stage.
        zero_stage=3 if raw["zero_stage"] is None else raw["zero_stage"],
        activation_checkpointing=raw["activation_checkpointing"],
        **sizes,
    )
    ceiling = Ceiling(_positive(raw, "gemm_tflops_per_s") * 1e12, _positive(raw, "copy_gb_per_s") * 1e9, file)
    name = str(raw["device"])
    gpu = gpu_named(name)
    return Measured(
        file=file,
        device_name=name,
        gpu=gpu,
        device=gpu_device(gpu, compute=work.compute, measured=[ceiling]) if gpu else cpu_device(name, ceiling),
        work=work,
        parallel=parallel,
        world=world,
        stage=stage,
        step_s=_positive(raw, "step_s"),
        peak_memory_bytes=_positive(raw, "peak_memory_bytes"),
        memory_before_bytes=float(raw.get("memory_before_bytes", 0)),
        ceiling=ceiling,
        encoders=bool(raw.get("encoders")),
    )


def predict(m: Measured) -> tuple[float, float]:
    """Seconds of a step and bytes of memory; without the reserve, which is no part of what was measured."""
    forecast = forecast_stage(m.work, m.stage, m.parallel, m.device, gpus=m.world)
    return forecast.step_s, forecast.memory_bytes - forecast.memory["reserve"] + m.memory_before_bytes


def read_gemm_corrections(folder: Path, gpu: str) -> tuple[dict[tuple[str, str], float], str]:
    """Measured over estimated rates by product and pass, and the file that has them; empty without one.

    Reads the newest ``gemm*.json`` of this GPU, the GPU suite's file of its job ``gemm``. Raises
    :class:`ConfigError` naming a file that is not one.
    """
    for path in sorted(folder.glob("gemm*.json"), reverse=True):
        try:
            parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
            ceilings = parts.pop("ceilings")
            if gpu_named(ceilings["device"]) != gpu:
                continue
            sms = GPUS[gpu].sms
            large = gemm_share(LARGE, LARGE, LARGE, sms=sms) / ceilings["gemm_tflops_per_s"]
            found = {}
            for raw in parts.values():
                m, k, n = raw["rows"], raw["in_features"], raw["out_features"]
                for name, shape in (("forward", (m, n, k)), ("dX", (m, k, n)), ("dW", (n, k, m))):
                    if (rate := raw.get(f"{name}_tflops_per_s")) is not None:
                        found[raw["name"], name] = rate * large / gemm_share(*shape, sms=sms)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"result file {path}: not what the GPU suite's job gemm writes: {error!r}"
            ) from error
        return found, path.name
    return {}, ""

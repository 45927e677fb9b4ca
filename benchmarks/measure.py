"""How every benchmark measures: medians of repetitions, and what the device can do at best in the same run."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.jobs.runner import first_line
from deco_scale.models.attention.autotune import keep_busy
from deco_scale.precision.config import PrecisionConfig

GEMM_SIDE = {"cuda": 8192, "cpu": 1536}
"""Side of the square product: large enough that the device is full."""
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
"""Bytes that are copied: far more than any cache."""


class Stopwatch:
    """Marks on a device's timeline: events of the current stream on a GPU, wall time elsewhere.

    A mark costs a few microseconds and waits for nothing; only reading an interval waits for a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"

    def mark(self) -> "torch.cuda.Event | float":
        """Now, as the device sees it."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, began: "torch.cuda.Event | float", ended: "torch.cuda.Event | float") -> float:
        """Seconds between two marks."""
        if isinstance(began, float) and isinstance(ended, float):
            return ended - began
        assert isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event)
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3


def synchronise(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_lost(device: torch.device) -> str | None:
    """Why a GPU computes nothing more in this process, as after a kernel that read beside its memory."""
    try:
        synchronise(device)
    except Exception as error:
        return first_line(error)
    return None


def medians_s(
    actions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    warmup: int = 2,
    launches: bool = True,
) -> dict[str, float]:
    """Median seconds of each action; one call of each in turn, so that a slow moment hits all of them.

    Without ``launches`` a GPU is kept busy before each call, so that the time is the kernels' alone.
    Raises ``ValueError`` for fewer than one repetition.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    watch = Stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(repeats + warmup):
        for name, action in actions.items():
            synchronise(device)
            if not launches:
                keep_busy(device)
            began = watch.mark()
            action()
            seconds = watch.seconds(began, watch.mark())
            if number >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def median_s(action: Callable[[], object], **options: Any) -> float:
    """Median seconds of one action, with the options of :func:`medians_s`."""
    return medians_s({"": action}, **options)[""]


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device did in this run: a square product, and a copy (bytes read plus bytes written)."""

    gemm_tflops_per_s: float
    copy_gb_per_s: float


def measure_ceilings(
    device: torch.device,
    dtype: torch.dtype,
    *,
    side: int | None = None,
    size: int | None = None,
    repeats: int = 10,
) -> Ceilings:
    """GEMM of ``side`` x ``side`` in ``dtype`` and a copy of ``size`` bytes; the defaults are the device's."""
    side, size = side or GEMM_SIDE[device.type], size or COPY_BYTES[device.type]
    left, right = torch.randn(2, side, side, device=device).to(dtype).unbind()
    out = torch.empty_like(left)
    options: dict[str, Any] = {"repeats": repeats, "device": device, "launches": False}
    gemm = median_s(lambda: torch.mm(left, right, out=out), **options)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = median_s(lambda: target.copy_(source), **options)
    return Ceilings(2 * side**3 / gemm / 1e12, 2 * size / copy / 1e9)


def captured(action: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``action`` as one CUDA graph, so that its time is the device's and not the launches'; elsewhere as it is.

    Not yet run on a GPU. ``action`` must read and write the same tensors each time and wait for nothing.
    """
    if device.type != "cuda":
        return action
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def gemm_dtype(precision: PrecisionConfig) -> torch.dtype:
    """What the GEMM ceiling computes in: fp8 runs are held against the bf16 ceiling, as model FLOPs are."""
    return torch.float32 if precision.compute == "fp32" else torch.bfloat16


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's as Linux reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "cpu"

"""The metrics of a logged step: losses, times, throughput, and which rank is slower than the others."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn

from deco_scale.distributed.collectives import gather_objects, sum_counters
from deco_scale.training.config import StageConfig
from deco_scale.training.train_step import StepResult

LISTED_RANKS = 64
"""In larger jobs a logged step has the median and the slowest rank in place of all."""
_CONSECUTIVE = 3
_MIN_SHARE = 0.05
"""Of a step's time: what a straggler must cost to be reported."""


class StepTimer:
    """Seconds per step, and seconds per step spent waiting for data, since the last :meth:`read`."""

    def __init__(self, step: int) -> None:
        self._start, self._from_step, self._wait_s = time.perf_counter(), step, 0.0

    def data_wait(self, seconds: float) -> None:
        """Time spent waiting for data, part of the step."""
        self._wait_s += seconds

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """What runs within (images, evaluation, checkpoints) is not part of the step."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self, step: int) -> tuple[float, float]:
        """``step_s`` and ``data_wait_s`` of the steps since the last call."""
        now = time.perf_counter()
        steps = step - self._from_step
        times = (now - self._start) / steps, self._wait_s / steps
        self._start, self._from_step, self._wait_s = now, step, 0.0
        return times


class RankComputeTimer:
    """Seconds that a rank's own linear layers took in a forward pass, without waiting for other ranks.

    In synchronous training every rank reports the same step time, even if only one is slow; this does not. Engines
    gather weights before a module's own hooks run, so the time between these is this device's work. With
    ``whole_blocks`` (compiled ones, whose insides must stay free of hooks) blocks are timed instead: under ZeRO-3
    and Megatron's layers that includes waiting for others. Nothing is measured but between :meth:`start` and
    :meth:`stop`.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, *, whole_blocks: bool) -> None:
        self._on_gpu, self._enabled = device.type == "cuda", False
        self._started: Any = None
        self._pairs: list[tuple[Any, Any]] = []
        for block in blocks:
            for module in [block] if whole_blocks else _linears(block):
                module.register_forward_pre_hook(self._begin)
                # Before hooks that send the result to other ranks.
                module.register_forward_hook(self._end, prepend=True)

    def start(self) -> None:
        self._started, self._pairs, self._enabled = None, [], True

    def stop(self) -> float:
        """Seconds since :meth:`start`; waits for the device."""
        self._enabled = False
        pairs, self._pairs = self._pairs, []
        if not self._on_gpu:
            return float(sum(end - begin for begin, end in pairs))
        for _, end in pairs[-1:]:
            end.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1000.0

    def _begin(self, *_: Any) -> None:
        if self._enabled:
            self._started = self._now()

    def _end(self, *_: Any) -> None:
        # Recomputing for the backward pass may break off within a module, which then has no end.
        if self._enabled and self._started is not None:
            self._pairs.append((self._started, self._now()))
            self._started = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _linears(block: nn.Module) -> list[nn.Module]:
    """Modules that are linear layers, whoever made them."""
    return [
        module
        for module in block.modules()
        if "Linear" in type(module).__name__ and not list(module.children()) and hasattr(module, "weight")
    ]


class StragglerDetector:
    """Names a rank whose own work took ``factor`` times the median's in three logged steps in a row."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._counts: dict[int, int] = {}

    def find(self, seconds: Sequence[float], step_s: float) -> dict[int, float]:
        """Ranks that became stragglers now, with their factors, from seconds by rank."""
        median = statistics.median(seconds)
        slow = {
            rank: each / median
            for rank, each in enumerate(seconds)
            if median > 0 and each > self._factor * median and each - median > _MIN_SHARE * step_s
        }
        self._counts = {rank: self._counts.get(rank, 0) + 1 for rank in slow}
        return {rank: factor for rank, factor in slow.items() if self._counts[rank] == _CONSECUTIVE}


def rank_times(seconds: Sequence[float]) -> Mapping[str, Any]:
    """What a logged step says of ranks' own seconds."""
    if len(seconds) <= LISTED_RANKS:
        return {"rank_step_s": [round(each, 6) for each in seconds]}
    return {"rank_step_median_s": statistics.median(seconds), "rank_step_max_s": max(seconds)}


def memory_bytes(device: torch.device) -> int:
    """Peak bytes on the GPU, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class MetricsCollector:
    """The metrics of a logged step: losses, times since the last one, throughput, what each rank's share took."""

    def __init__(
        self,
        *,
        step: int,
        stage: StageConfig,
        image_flops: float,
        peak_flops: float | None,
        straggler_factor: float,
        rank_compute: RankComputeTimer | None,
        device: torch.device,
    ) -> None:
        self._stage, self._image_flops, self._peak_flops = stage, image_flops, peak_flops
        self._timer, self._rank_compute, self._device = StepTimer(step), rank_compute, device
        self._stragglers = StragglerDetector(straggler_factor)
        self.data_wait, self.excluded = self._timer.data_wait, self._timer.excluded

    def time_rank(self) -> None:
        """The step that begins now will be logged: time this rank's own work in it."""
        if self._rank_compute is not None:
            self._rank_compute.start()

    def read(
        self, result: StepResult, *, step: int, samples: int, skipped: int, counters: Mapping[str, int]
    ) -> tuple[dict[str, Any], Mapping[int, float]]:
        """Metrics since the last call, and new stragglers with their factors; waits for the device.

        All ranks together; ``counters`` are this rank's, summed over ranks in the result.
        """
        losses = {name: value.item() for name, value in result.losses.items()}
        grad_norm = result.grad_norm.item()
        step_s, wait_s = self._timer.read(step)
        own_s = wait_s + (self._rank_compute.stop() if self._rank_compute is not None else 0.0)
        ranks = gather_objects((dict(counters), own_s))
        seconds = [each for _, each in ranks]
        images_per_s = self._stage.global_batch / step_s
        metrics = {
            "time": time.time(),
            "step": step,
            "stage": self._stage.name,
            "samples": samples,
            **{name: losses.get(name) for name in ("loss", "loss_flow", "loss_freq", "loss_repa")},
            "grad_norm": grad_norm,
            "lr": self._stage.lr,
            "images_per_s": images_per_s,
            "mfu": self._image_flops * images_per_s / self._peak_flops if self._peak_flops else None,
            "step_s": step_s,
            "data_wait_s": wait_s,
            **rank_times(seconds),
            "memory_bytes": memory_bytes(self._device),
            "skipped": skipped,
            **{f"data.{name}": n for name, n in sorted(sum_counters(each for each, _ in ranks).items())},
        }
        return metrics, self._stragglers.find(seconds, step_s)

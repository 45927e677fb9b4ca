"""The metrics of a logged step: losses, times, throughput, and which rank is slower than the others."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from deco_scale.distributed.collectives import gather_objects, sum_counters
from deco_scale.training.train_step import StepResult

if TYPE_CHECKING:
    from deco_scale.training.trainer import Progress, Stage, Trainer

LISTED_RANKS = 64
"""In larger jobs a logged step has the median and the slowest rank in place of all."""
_CONSECUTIVE = 3
_MIN_SHARE = 0.05
"""Of a step's time: what a straggler must cost to be reported."""


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


def memory_bytes(device: torch.device) -> int:
    """Peak bytes on the GPU, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class MetricsCollector:
    """The metrics of a logged step: losses, times since the last one, throughput, what each rank's share took.

    A straggler's own work took ``straggler_factor`` times the median rank's in three logged steps in a row.
    """

    def __init__(self, trainer: "Trainer", stage: "Stage", step: int) -> None:
        self._trainer, self._stage = trainer, stage
        self._start, self._from_step, self._wait_s = time.perf_counter(), step, 0.0
        self._slow: dict[int, int] = {}

    def data_wait(self, seconds: float) -> None:
        """Time spent waiting for data, part of the step."""
        self._wait_s += seconds

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """What runs within (images, evaluation, checkpoints) is not part of the step."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(
        self, result: StepResult, progress: "Progress", skipped: int, counters: Mapping[str, int]
    ) -> tuple[dict[str, Any], Mapping[int, float]]:
        """Metrics since the last call, and new stragglers with their factors; waits for the device.

        All ranks together; ``counters`` are this rank's, summed over ranks in the result.
        """
        losses = {name: value.item() for name, value in result.losses.items()}
        grad_norm = result.grad_norm.item()
        now, steps = time.perf_counter(), progress.step - self._from_step
        step_s, wait_s = (now - self._start) / steps, self._wait_s / steps
        self._start, self._from_step, self._wait_s = now, progress.step, 0.0
        timer, peak = self._trainer.rank_compute, self._trainer.peak_flops
        ranks = gather_objects((dict(counters), wait_s + (timer.stop() if timer is not None else 0.0)))
        own_s = [seconds for _, seconds in ranks]
        rank_times: dict[str, Any] = {"rank_step_s": [round(seconds, 6) for seconds in own_s]}
        if len(own_s) > LISTED_RANKS:
            rank_times = {"rank_step_median_s": statistics.median(own_s), "rank_step_max_s": max(own_s)}
        images_per_s = self._stage.cfg.global_batch / step_s
        metrics = {
            "time": time.time(),
            "step": progress.step,
            "stage": self._stage.cfg.name,
            "samples": progress.samples,
            **{name: losses.get(name) for name in ("loss", "loss_flow", "loss_freq", "loss_repa")},
            "grad_norm": grad_norm,
            "lr": self._stage.lr_at(progress.step),
            "images_per_s": images_per_s,
            "mfu": self._stage.image_flops * images_per_s / peak if peak else None,
            "step_s": step_s,
            "data_wait_s": wait_s,
            **rank_times,
            "memory_bytes": memory_bytes(self._trainer.device),
            "skipped": skipped,
            **{f"data.{name}": n for name, n in sorted(sum_counters(each for each, _ in ranks).items())},
        }
        return metrics, self._new_stragglers(own_s, step_s)

    def _new_stragglers(self, own_s: Sequence[float], step_s: float) -> dict[int, float]:
        median, limit = statistics.median(own_s), self._trainer.faults.straggler_factor
        slow = {
            rank: each / median
            for rank, each in enumerate(own_s)
            if median > 0 and each > limit * median and each - median > _MIN_SHARE * step_s
        }
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}
        return {rank: factor for rank, factor in slow.items() if self._slow[rank] == _CONSECUTIVE}

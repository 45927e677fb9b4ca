"""Times between two logged steps, and which rank holds the others up."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import nn

LISTED_RANKS = 64
"""In larger jobs a logged step has the median and the slowest rank in place of all."""
_IN_A_ROW = 3
_SHARE = 0.05
"""What a straggler costs at least, of a step's time, to be worth a word."""


class StepTimer:
    """Seconds a step and seconds a step spent on waiting for data, since the last :meth:`read`."""

    def __init__(self, step: int) -> None:
        self._began, self._from_step, self._wait_s = time.perf_counter(), step, 0.0

    def waited(self, seconds: float) -> None:
        """Time spent on waiting for data, part of the step."""
        self._wait_s += seconds

    def other(self, seconds: float) -> None:
        """Time spent on pictures and checkpoints, no part of the step."""
        self._began += seconds

    def read(self, step: int) -> tuple[float, float]:
        """``step_s`` and ``data_wait_s`` of the steps since the last call."""
        now = time.perf_counter()
        steps = step - self._from_step
        found = (now - self._began) / steps, self._wait_s / steps
        self._began, self._from_step, self._wait_s = now, step, 0.0
        return found


class RankComputeTimer:
    """Seconds that a rank's own linear layers took in a forward pass, without waiting for other ranks.

    A synchronous step takes every rank the same time, whoever is slow; this does not. Engines gather weights
    before a module's own hooks run, so the time between these is this device's work. With ``whole_blocks``
    (compiled ones, whose insides must stay free of hooks) blocks are timed instead: under ZeRO-3 and Megatron's
    layers that includes waiting for others. Nothing is measured but between :meth:`start` and :meth:`stop`.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, *, whole_blocks: bool) -> None:
        self._on_gpu, self._on = device.type == "cuda", False
        self._begun: Any = None
        self._pairs: list[tuple[Any, Any]] = []
        for block in blocks:
            for module in [block] if whole_blocks else _linears(block):
                module.register_forward_pre_hook(self._begin)
                # Before hooks that send the result to other ranks.
                module.register_forward_hook(self._end, prepend=True)

    def start(self) -> None:
        self._begun, self._pairs, self._on = None, [], True

    def stop(self) -> float:
        """Seconds since :meth:`start`; waits for the device."""
        self._on = False
        pairs, self._pairs = self._pairs, []
        if not self._on_gpu:
            return float(sum(end - begin for begin, end in pairs))
        for _, end in pairs[-1:]:
            end.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1000.0

    def _begin(self, *_: Any) -> None:
        if self._on:
            self._begun = self._now()

    def _end(self, *_: Any) -> None:
        # Recomputing for the backward pass may break off within a module, which then has no end.
        if self._on and self._begun is not None:
            self._pairs.append((self._begun, self._now()))
            self._begun = None

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
            if median > 0 and each > self._factor * median and each - median > _SHARE * step_s
        }
        self._counts = {rank: self._counts.get(rank, 0) + 1 for rank in slow}
        return {rank: factor for rank, factor in slow.items() if self._counts[rank] == _IN_A_ROW}


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

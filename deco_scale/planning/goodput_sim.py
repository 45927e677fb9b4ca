"""Goodput of a run whose processes fail: closed forms, the best interval between checkpoints, and a simulation.

The model. Faults arrive with exponential gaps of mean M (``mtbf_s``, of the job) and stop the work at once.
Then, and at the beginning, ``restart_s`` pass (a fault in them begins them anew) and the job goes on from the
last complete checkpoint. Work is cut into equal segments of ``interval_s``; each ends with a save that blocks
the job for ``stall_s`` and is complete ``checkpoint_s`` after its start; the rest overlaps the next segment, so a
fault in that time costs one segment more. A segment waits where the save before it has not ended. After
the last one the job waits for its save.

With s the length of a segment with its stall, R the restart and L = checkpoint_s - stall_s, memorylessness gives
for a segment without and with a save beside it

    B = M exp(R/M) (exp(s/M) - 1)          A = exp(L/M) B

B is equation 20 of Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future
Generation Computer Systems 22 (2006), for one segment; with L = 0 the two are the same. The best interval is thus
that of blocking saves that last ``stall_s``: Young's sqrt(2 C M) (CACM 17, 1974), Daly's higher order, or exact.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deco_scale.errors import ConfigError

LLAMA3_GPU_MTBF_HOURS = 54 * 24 * 16384 / 419
"""Hours of one GPU between interruptions of Llama 3's training: 419 unexpected ones in 54 days on 16,384 GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """What a job meets, in seconds: time between its faults, a save, the part of it that stalls, a restart."""

    mtbf_s: float
    checkpoint_s: float
    stall_s: float
    restart_s: float

    def __post_init__(self) -> None:
        times = {"mean time between faults": self.mtbf_s, "stall of a checkpoint": self.stall_s}
        for what, seconds in times.items():
            if not 0 < seconds < math.inf:
                raise ConfigError(f"the {what}, {seconds} s, must be positive and finite")
        if not self.stall_s <= self.checkpoint_s < math.inf:
            raise ConfigError(
                f"a checkpoint's time, {self.checkpoint_s} s, must be finite and at least its stall, "
                f"{self.stall_s} s"
            )
        if not 0 <= self.restart_s < math.inf:
            raise ConfigError(f"the time of a restart, {self.restart_s} s, must be finite and not negative")

    @property
    def lag_s(self) -> float:
        """Time from the end of a save's stall until it is complete."""
        return self.checkpoint_s - self.stall_s

    def segment_s(self, interval_s: float) -> float:
        """A segment of work with its stall, and its wait for a save before it that takes longer."""
        return max(interval_s + self.stall_s, self.checkpoint_s)


def young_interval(faults: Faults) -> float:
    """Seconds of work between checkpoints by Young's first order."""
    return math.sqrt(2 * faults.stall_s * faults.mtbf_s)


def daly_interval(faults: Faults) -> float:
    """Seconds of work between checkpoints by Daly's higher order (his equation 37)."""
    stall, mtbf = faults.stall_s, faults.mtbf_s
    if stall >= 2 * mtbf:
        return mtbf
    root = math.sqrt(stall / (2 * mtbf))
    return math.sqrt(2 * stall * mtbf) * (1 + root / 3 + root * root / 9) - stall


def best_interval(faults: Faults) -> float:
    """Seconds of work between checkpoints that cost least in this model, to nine digits.

    The root of exp((t + C)/M) (1 - t/M) = 1, or where saves would overlap the shortest interval at which they do
    not, if that is longer.
    """
    stall, low, high = faults.stall_s / faults.mtbf_s, 0.0, math.nextafter(1.0, 0.0)
    for _ in range(100):
        middle = (low + high) / 2
        # The logarithm: the exponential may be too large for a float.
        low, high = (middle, high) if middle + stall + math.log1p(-middle) > 0 else (low, middle)
    return max(low * faults.mtbf_s, faults.lag_s)


def segments_of(work_s: float, interval_s: float) -> int:
    """Equal segments into which work is cut for an interval near ``interval_s``."""
    if not work_s > 0 or not interval_s > 0:
        raise ValueError(f"work_s={work_s} and interval_s={interval_s} must be positive")
    return max(round(work_s / interval_s), 1)


def expected_s(faults: Faults, work_s: float, segments: int) -> float:
    """Mean wall-clock seconds of the run, exact in the model; inf where it is beyond a float."""
    mtbf, lag = faults.mtbf_s, faults.lag_s
    segment = faults.segment_s(work_s / segments)
    try:
        restart = mtbf * math.exp(faults.restart_s / mtbf)
        alone = restart * math.expm1(segment / mtbf)
        beside = math.exp(lag / mtbf) * alone
        last = restart * math.exp(segment / mtbf) * math.expm1(lag / mtbf)
        return mtbf * math.expm1(faults.restart_s / mtbf) + alone + (segments - 1) * beside + last
    except OverflowError:
        return math.inf


def goodput(faults: Faults, work_s: float, segments: int) -> float:
    """Work over the mean wall clock."""
    return work_s / expected_s(faults, work_s, segments)


class Simulated(NamedTuple):
    """Mean wall-clock seconds of simulated runs with its standard error, and the mean number of faults."""

    mean_s: float
    error_s: float
    faults: float


def simulate(
    faults: Faults, work_s: float, segments: int, *, runs: int, seed: int, max_faults: int = 1_000_000
) -> Simulated | None:
    """Play ``runs`` runs with drawn faults; None where one meets more than ``max_faults``.

    It knows nothing of the closed forms: each fault is drawn, and what is complete at that moment is counted.
    """
    random, segment = np.random.default_rng(seed), faults.segment_s(work_s / segments)
    wall, met, durable, active = np.zeros(runs), np.zeros(runs), np.zeros(runs, dtype=np.int64), np.arange(runs)
    for _ in range(max_faults + 1):
        gap = random.exponential(faults.mtbf_s, size=len(active))
        need = faults.restart_s + (segments - durable[active]) * segment + faults.lag_s
        done = gap >= need
        wall[active] += np.where(done, need, gap)
        met[active] += ~done
        active, gap = active[~done], gap[~done]
        if not len(active):
            return Simulated(float(wall.mean()), float(wall.std(ddof=1) / math.sqrt(runs)), float(met.mean()))
        worked = gap - faults.restart_s
        passed = np.floor(np.maximum(worked, 0.0) / segment)
        within = worked - passed * segment
        # The save of the last segment that was passed may not have been complete.
        complete = np.where((passed > 0) & (within < faults.lag_s), passed - 1, passed)
        durable[active] += np.where(worked > 0, complete, 0).astype(np.int64)
    return None

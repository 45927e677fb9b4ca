"""How long the steps of a run will still take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deco_scale.watching.events import is_number
from deco_scale.watching.folder import RunFolder, StagePlan

_RECENT = 20
"""Logged steps over which the time of a step is taken."""


@dataclass(frozen=True, slots=True)
class Remaining:
    """A stage, the steps done of it, and the seconds that its others will take; None before any was timed."""

    stage: StagePlan
    done: int
    seconds: float | None


def remaining(run: RunFolder) -> list[Remaining]:
    """Each stage of the configuration at the pace of its own last logged steps; saves and faults are left out."""
    reached = int(run.last.get("step", 0))
    found = []
    for stage in run.stages:
        size = stage.end - stage.begin
        done = min(max(reached - stage.begin, 0), size)
        pace = _pace([line for line in run.metrics if line.get("stage") == stage.name][-_RECENT:])
        left = None if pace is None else (size - done) * pace
        found.append(Remaining(stage, done, 0.0 if done == size else left))
    return found


def total_s(parts: Sequence[Remaining]) -> float | None:
    """Seconds to the end of the run, None where those of a stage are not known."""
    seconds = [part.seconds for part in parts if part.seconds is not None]
    return sum(seconds) if parts and len(seconds) == len(parts) else None


def _pace(lines: Sequence[Mapping[str, Any]]) -> float | None:
    times = [line["step_s"] for line in lines if is_number(line.get("step_s"))]
    return sum(times) / len(times) if times else None

"""Goodput: where the time of a run went. Every moment from the first start to now is in exactly one class.

Times are whole microseconds, and a history is cut into spans that follow each other without a gap, so the classes
add up to the wall clock exactly.

    start             processes start, load data, weights and encoders, up to the first step of an attempt
    compile           the first step of each stage in an attempt, as a whole
    step              steps that count
    data_wait         the part of their time that was spent waiting for data
    checkpoint_stall  training blocked by a save
    evaluation        images and scores that training waited for
    lost              work (steps, waits, stalls, evaluations) past the step from which a later attempt resumed, or
                      to which the run was rolled back
    down              from an attempt's last sign of life to the next start

The last sign of life of a killed process is its last line: work after it is in ``down``, not in ``lost``. A rank
that hangs is found by the watchdog after a while, which is in ``down`` too: where the ``hang`` event has
``silent_s``, life ended that long before it, although the step that hung may be logged when its process ends.
Between two logged steps, lost work is taken in proportion to the steps.
"""

import heapq
import math
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, zip_longest
from typing import Any, NamedTuple

from deco_scale.observability.events import Event, is_number

CLASSES = ("start", "compile", "step", "data_wait", "checkpoint_stall", "evaluation", "lost", "down")
SILENT_S = 900.0  # seconds without a line after which an attempt without an end is taken for dead

_SECOND = 1_000_000
_LOGGED = "metrics"  # kind of the marks that are logged steps
_SAVES = ("checkpoint", "checkpoint_failed", "export")
_PROGRESS = (*_SAVES, _LOGGED, "first_step", "evaluation", "skip", "spike", "rollback", "straggler", "stop_signal")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One launch: Unix seconds of its start and of its last sign of life, and how it ended.

    ``from_step`` and ``to_step`` are None where no step was done; ``reason`` is what it or the watchdog reported.
    """

    number: int
    world_size: int
    start: float
    last_active: float
    from_step: int | None
    to_step: int | None
    reason: str | None
    exit_code: int | None
    running: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Microseconds of each class, the wall clock that they add up to, and the attempts."""

    microseconds: Mapping[str, int]
    wall_us: int
    attempts: tuple[Attempt, ...]

    def seconds(self, name: str) -> float:
        return self.microseconds[name] / _SECOND

    @property
    def wall_s(self) -> float:
        return self.wall_us / _SECOND

    @property
    def effective(self) -> float:
        """Share of the wall clock that was spent on steps that count; 0 before there is any time."""
        return self.microseconds["step"] / self.wall_us if self.wall_us else 0.0

    def as_metrics(self) -> dict[str, float]:
        """Seconds of the classes and the effective share, under their names in ``metrics.jsonl``."""
        return {
            **{f"goodput.{name}_s": self.seconds(name) for name in CLASSES},
            "goodput.effective": self.effective,
        }


@dataclass(slots=True)
class _Mark:
    """A line of either file, the earliest ``resume`` after it, and the data wait of the attempt's next steps."""

    time: int
    kind: str
    fields: Mapping[str, Any]
    resume: float = math.inf  # step from which anything after it went on
    waited: float | None = None  # as a share; None after the last logged step

    @property
    def step(self) -> int:
        return int(self.fields["step"])

    @property
    def reached(self) -> int:
        """The step of the weights after it."""
        return self.fields["to_step"] if self.kind == "rollback" else self.step


@dataclass(slots=True)
class _Launch:
    """The marks of one attempt, the end of its life, and the start of the next one or the horizon."""

    start: _Mark
    marks: list[_Mark] = field(default_factory=list)
    end: int = 0
    next_start: int = 0

    def last(self, *kinds: str) -> _Mark | None:
        return next((mark for mark in reversed(self.marks) if mark.kind in kinds), None)


class _Span(NamedTuple):
    """Time of one class; of its work the share ``lost`` was in vain, of the rest the share ``waited`` for data."""

    start: int
    end: int
    name: str
    lost: float = 0.0
    waited: float = 0.0


def compute_goodput(
    events: Sequence[Event], metrics: Sequence[Mapping[str, Any]], *, now: float
) -> Goodput | None:
    """The goodput at ``now`` (Unix seconds) by all lines of both files, in the files' order.

    None before the first start. Lines of metrics without ``time`` are left out. A clock that goes back is held
    until it has caught up, and nothing is later than ``now``. A run that ended with exit code 0 ends there.
    """
    now_us = round(now * _SECOND)
    launches = _launches(_merge(events, metrics, now_us), now_us, round(SILENT_S * _SECOND))
    if not launches:
        return None
    totals = dict.fromkeys(CLASSES, 0)
    for launch in launches:
        _add_up(launch, totals)
    wall = launches[-1].next_start - launches[0].start.time
    assert sum(totals.values()) == wall, (totals, wall)
    attempts = tuple(_attempt(launch, last=launch is launches[-1]) for launch in launches)
    return Goodput(microseconds=totals, wall_us=wall, attempts=attempts)


def _add_up(launch: _Launch, totals: dict[str, int]) -> None:
    """Add the attempt's time, and its downtime, to the classes."""
    overlays = _overlays(launch)
    for span in overlays:
        totals["lost" if span.lost else span.name] += span.end - span.start
    starts = [span.start for span in overlays]
    covered = [0, *accumulate(span.end - span.start for span in overlays)]

    def uncovered(time: int) -> int:
        k = bisect(starts, time)
        return time - covered[k] + (max(overlays[k - 1].end - time, 0) if k else 0)

    for span in _work(launch):
        length = uncovered(span.end) - uncovered(span.start)
        # The product is a float, which for absurd lengths rounds beyond them.
        lost = min(round(length * span.lost), length)
        waited = min(round((length - lost) * span.waited), length - lost)
        totals["lost"] += lost
        totals["data_wait"] += waited
        totals[span.name] += length - lost - waited
    totals["down"] += launch.next_start - launch.end


def _monotonic(lines: list[tuple[float, str, Mapping[str, Any]]], now: int) -> list[_Mark]:
    """Marks whose time never goes back and is never later than ``now``."""
    times = accumulate((min(round(seconds * _SECOND), now) for seconds, _, _ in lines), max)
    return [_Mark(time, kind, fields) for time, (_, kind, fields) in zip(times, lines, strict=True)]


def _merge(events: Sequence[Event], metrics: Sequence[Mapping[str, Any]], now: int) -> list[_Mark]:
    """Marks of both files by time, from the first start on, each with the resume that follows it."""
    lines = [line for line in metrics if is_number(line.get("time")) and is_number(line.get("step"))]
    logged = [(line["time"], _LOGGED, line) for line in lines]
    happened = [(event.time, event.kind, event.fields) for event in events if event.kind != _LOGGED]
    # At the same moment a logged step belongs to the attempt before, not to one that starts.
    marks = list(heapq.merge(_monotonic(logged, now), _monotonic(happened, now), key=lambda mark: mark.time))
    marks = marks[next((i for i, mark in enumerate(marks) if mark.kind == "start"), len(marks)) :]
    resume, following, waited = math.inf, None, None
    for mark in reversed(marks):
        if mark.kind in (_LOGGED, "start"):
            waited = _waited_share(mark.fields) if mark.kind == _LOGGED else None
        mark.resume, mark.waited = resume, waited
        if mark.kind == "rollback":
            resume = min(resume, mark.reached)
        elif mark.kind == "start" and following is not None and following.kind != "start":
            resume = min(resume, following.step - 1)
        if mark.kind in ("first_step", _LOGGED, "start"):
            following = mark
    return marks


def _launches(marks: list[_Mark], now: int, silent: int) -> list[_Launch]:
    launches: list[_Launch] = []
    for mark in marks:
        if mark.kind == "start":
            launches.append(_Launch(mark))
        else:
            launches[-1].marks.append(mark)
    for launch, following in zip_longest(launches, launches[1:]):
        _drop_hung_steps(launch)
        launch.end = (launch.last(*_PROGRESS) or launch.start).time
        if following is not None:
            launch.next_start = following.start.time
            continue
        launch.next_start, ended = now, launch.last("end")
        after = {mark.kind for mark in launch.marks if mark.time >= launch.end}
        if ended is not None and ended.fields["exit_code"] == 0:
            launch.next_start = max(ended.time, launch.end)
        elif not {"end", "hang", "lost_rank"} & after and now - launch.end <= silent:
            launch.end = now  # still working, as far as one can tell
    return launches


def _drop_hung_steps(launch: _Launch) -> None:
    """Without what was logged while a rank made no progress: no step went on in that time."""
    hang = launch.last("hang")
    if hang is not None and is_number(silent_s := hang.fields.get("silent_s")):
        since = hang.time - round(silent_s * _SECOND)
        launch.marks = [m for m in launch.marks if m.kind not in _PROGRESS or m.time <= since]


def _attempt(launch: _Launch, *, last: bool) -> Attempt:
    steps = [mark.step for mark in launch.marks if mark.kind in ("first_step", _LOGGED)]
    ended, fault = launch.last("end"), launch.last("hang", "lost_rank")
    reason = ended.fields["reason"] if ended else None
    if ended is None and fault is not None:
        host = f" on {fault.fields['host']}" if fault.fields.get("host") else ""
        reason = f"rank {fault.fields['rank']}{host} {'hung' if fault.kind == 'hang' else 'was lost'}"
    return Attempt(
        number=launch.start.fields["attempt"],
        world_size=launch.start.fields["world_size"],
        start=launch.start.time / _SECOND,
        last_active=launch.end / _SECOND,
        from_step=steps[0] - 1 if steps else None,
        to_step=steps[-1] if steps else None,
        reason=reason,
        exit_code=ended.fields["exit_code"] if ended else None,
        running=last and ended is None and launch.end == launch.next_start,
    )


def _work(launch: _Launch) -> Iterator[_Span]:
    """The attempt's life without interruptions: its start, then work between marks that tell the step."""
    anchors = [mark for mark in launch.marks if mark.kind in ("first_step", _LOGGED, "rollback")]
    yield _Span(launch.start.time, anchors[0].time if anchors else launch.end, "start")
    if not anchors:
        return
    waited = anchors[0].waited or 0.0
    for before, mark in pairwise(anchors):
        waited = waited if mark.waited is None else mark.waited
        # What a rollback takes back is before it; its own step is where the weights were.
        resume = min(mark.resume, mark.reached) if mark.kind == "rollback" else mark.resume
        yield _Span(before.time, mark.time, "step", _lost_share(before.reached, mark.step, resume), waited)
    last = anchors[-1]
    yield _Span(last.time, launch.end, "step", float(last.resume <= last.reached), waited)


def _lost_share(start: int, end: int, resume: float) -> float:
    """Share of the steps after ``start`` up to ``end`` that are later than ``resume``."""
    if end <= start:
        return float(end > resume)
    return min(max(end - max(start, resume), 0), end - start) / (end - start)


def _waited_share(line: Mapping[str, Any]) -> float:
    waited, step_s = line.get("data_wait_s"), line.get("step_s")
    return min(max(waited / step_s, 0.0), 1.0) if is_number(waited) and is_number(step_s) and step_s > 0 else 0.0


def _overlays(launch: _Launch) -> list[_Span]:
    """First steps, stalls and evaluations within the attempt's life, one after the other."""
    overlays = []
    for mark in launch.marks:
        lost = float(mark.kind in (*_SAVES, "evaluation") and mark.step > mark.resume)
        if mark.kind in _SAVES:
            start = mark.time - round(mark.fields["total_s"] * _SECOND)
            end = min(start + round(mark.fields["stall_s"] * _SECOND), mark.time)
            overlays.append(_Span(start, end, "checkpoint_stall", lost))
        elif mark.kind in ("evaluation", "first_step"):
            name = "evaluation" if mark.kind == "evaluation" else "compile"
            overlays.append(_Span(mark.time - round(mark.fields["seconds"] * _SECOND), mark.time, name, lost))
    spans, time = [], launch.start.time
    for span in sorted(overlays, key=lambda span: (span.start, span.end)):
        start, end = max(span.start, time), min(span.end, launch.end)
        if start < end:
            spans.append(_Span(start, end, span.name, span.lost))
            time = end
    return spans

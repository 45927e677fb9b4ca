"""Where the time of a run went: every moment from the first start to now is in exactly one class.

Times are whole microseconds, and a history is cut into pieces that follow each other without a gap, so the classes
add up to the wall clock exactly.

    start             processes begin, load data, weights and encoders, up to the first step of an attempt
    compile           the first step of each stage in an attempt, as a whole
    step              steps that count
    data_wait         the part of their time that was spent on waiting for data
    checkpoint_stall  training held up by a save
    evaluation        pictures and scores that training waited for
    lost              work (steps, waits, stalls, evaluations) past the step from which a later attempt went on, or
                      to which the run was rolled back
    down              from an attempt's last sign of life to the next start

The last sign of life of a killed process is its last line: work after it is in ``down``, not in ``lost``.
Between two logged steps, lost work is taken in proportion to the steps.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deco_scale.observability.events import Event, is_number

CLASSES = ("start", "compile", "step", "data_wait", "checkpoint_stall", "evaluation", "lost", "down")
SILENT_S = 900.0
"""Seconds without a line after which an attempt without an end is taken for dead."""

_SAVES = ("checkpoint", "checkpoint_failed", "export")
_PROGRESS = (*_SAVES, "first_step", "evaluation", "skip", "spike", "rollback", "straggler", "stop_signal")
_SECOND = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One launch: Unix seconds of its start and of its last sign of life, and how it ended.

    ``from_step`` and ``to_step`` are None where no step was done; ``reason`` is what it or the watchdog said.
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
        """Seconds by the names that ``metrics.jsonl`` has for them, and the effective share."""
        seconds = {f"goodput.{name}_s": self.seconds(name) for name in CLASSES}
        return {**seconds, "goodput.effective": self.effective}


@dataclass(slots=True)
class _Mark:
    """A line of either file at a whole microsecond; ``metrics`` is None for an event."""

    at: int
    event: Event | None
    metrics: Mapping[str, Any] | None
    resume: float = math.inf
    """The earliest step from which anything after this mark went on."""

    @property
    def kind(self) -> str:
        return "metrics" if self.event is None else self.event.kind

    @property
    def progress(self) -> bool:
        return self.event is None or self.event.kind in _PROGRESS

    def number(self, name: str) -> Any:
        assert self.event is not None
        return self.event.fields[name]


@dataclass(slots=True)
class _Launch:
    """The marks of one attempt, ``start`` to ``end`` of its life, and the start of the next or the horizon."""

    start: _Mark
    marks: list[_Mark] = field(default_factory=list)
    end: int = 0
    until: int = 0


@dataclass(frozen=True, slots=True)
class _Span:
    """From ``begin`` to ``end``; of work up to ``step``, the share ``lost`` was done in vain."""

    begin: int
    end: int
    name: str
    lost: float = 0.0
    waited: float = 0.0


def compute_goodput(
    events: Sequence[Event],
    metrics: Sequence[Mapping[str, Any]],
    *,
    now: float,
    silent_s: float = SILENT_S,
) -> Goodput | None:
    """The accounting at ``now`` (Unix seconds) of all lines of both files, in the files' order.

    None before the first start. Lines of metrics without ``time`` are left out. A clock that goes back is held
    until it has caught up, and nothing is later than ``now``. A run that ended with exit code 0 ends there.
    """
    launches = _launches(_merged(events, metrics, now), round(now * _SECOND), round(silent_s * _SECOND))
    if not launches:
        return None
    totals = dict.fromkeys(CLASSES, 0)
    for launch in launches:
        for span in _spans(launch):
            _add(totals, span)
    wall = launches[-1].until - launches[0].start.at
    assert sum(totals.values()) == wall, (totals, wall)
    return Goodput(
        microseconds=totals,
        wall_us=wall,
        attempts=tuple(_attempt(launch, last=launch is launches[-1]) for launch in launches),
    )


def _held(times: Iterable[tuple[float, Any]], now: int) -> Iterator[tuple[int, Any]]:
    latest: int | None = None
    for time, item in times:
        at = min(round(time * _SECOND), now)
        latest = at if latest is None else max(latest, at)
        yield latest, item


def _merged(events: Sequence[Event], metrics: Sequence[Mapping[str, Any]], now_s: float) -> list[_Mark]:
    """Marks of both files by time, from the first start on, each with the resume that follows it."""
    now = round(now_s * _SECOND)
    timed = [line for line in metrics if is_number(line.get("time")) and is_number(line.get("step"))]
    lines = _held(((line["time"], line) for line in timed), now)
    happened = _held(((event.time, event) for event in events), now)
    marks = list(
        heapq.merge(
            # At the same moment a logged step is of the attempt before, not of one that starts.
            (_Mark(at, None, line) for at, line in lines),
            (_Mark(at, event, None) for at, event in happened),
            key=lambda mark: mark.at,
        )
    )
    first = next((i for i, mark in enumerate(marks) if mark.kind == "start"), len(marks))
    marks = marks[first:]
    resume = math.inf
    for i in range(len(marks) - 1, -1, -1):
        mark = marks[i]
        mark.resume = resume
        if mark.kind == "rollback":
            resume = min(resume, mark.number("to_step"))
        elif mark.kind == "start":
            begun = next((m for m in itertools.islice(marks, i + 1, None) if m.kind in _BEGINS), None)
            if begun is not None and begun.kind != "start":
                resume = min(resume, _step(begun) - 1)
    return marks


_BEGINS = ("first_step", "metrics", "start")


def _step(mark: _Mark) -> int:
    """The step that a line of metrics or an event is about."""
    return int(mark.metrics["step"]) if mark.metrics is not None else int(mark.number("step"))


def _launches(marks: list[_Mark], now: int, silent: int) -> list[_Launch]:
    launches: list[_Launch] = []
    for mark in marks:
        if mark.kind == "start":
            launches.append(_Launch(mark))
        else:
            launches[-1].marks.append(mark)
    for i, launch in enumerate(launches):
        last = i + 1 == len(launches)
        signs = [mark.at for mark in launch.marks if mark.progress]
        launch.end = signs[-1] if signs else launch.start.at
        launch.until = now if last else launches[i + 1].start.at
        ended = next((mark for mark in reversed(launch.marks) if mark.kind == "end"), None)
        if last and ended is not None and ended.number("exit_code") == 0:
            launch.until = max(ended.at, launch.end)
        if last and _alive(launch, now, silent):
            launch.end = now
    return launches


def _alive(launch: _Launch, now: int, silent: int) -> bool:
    """Whether the last attempt may still work: no end or fault since its last progress, and not long silent."""
    after = [mark.kind for mark in launch.marks if mark.at >= launch.end and not mark.progress]
    return not {"end", "hang", "lost_rank"} & set(after) and now - launch.end <= silent


def _attempt(launch: _Launch, *, last: bool) -> Attempt:
    steps = [_step(mark) for mark in launch.marks if mark.kind in ("first_step", "metrics")]
    ended = next((mark for mark in reversed(launch.marks) if mark.kind == "end"), None)
    return Attempt(
        number=launch.start.number("attempt"),
        world_size=launch.start.number("world_size"),
        start=launch.start.at / _SECOND,
        last_active=launch.end / _SECOND,
        from_step=steps[0] - 1 if steps else None,
        to_step=steps[-1] if steps else None,
        reason=ended.number("reason") if ended else _fault(launch),
        exit_code=ended.number("exit_code") if ended else None,
        running=last and ended is None and launch.end == launch.until,
    )


def _fault(launch: _Launch) -> str | None:
    """Why an attempt without an end is over, if the watchdog has said it."""
    for mark in reversed(launch.marks):
        if mark.event is not None and mark.kind in ("hang", "lost_rank"):
            what = "hung" if mark.kind == "hang" else "was lost"
            host = mark.event.fields.get("host")
            return f"rank {mark.number('rank')}{f' on {host}' if host else ''} {what}"
    return None


def _spans(launch: _Launch) -> Iterator[_Span]:
    """All of the attempt's time in order, then the time down."""
    overlays = _overlays(launch)
    at, k = launch.start.at, 0
    for work in _work(launch):
        while at < work.end:
            while k < len(overlays) and overlays[k].end <= at:
                k += 1
            over = overlays[k] if k < len(overlays) else None
            if over is not None and over.begin <= at:
                end = min(over.end, work.end)
                yield _Span(at, end, over.name, over.lost)
            else:
                end = work.end if over is None else min(over.begin, work.end)
                yield _Span(at, end, work.name, work.lost, work.waited)
            at = end
    if at < launch.until:
        yield _Span(at, launch.until, "down")


def _work(launch: _Launch) -> list[_Span]:
    """The attempt's life without what is laid over it: its start, then work from anchor to anchor."""
    anchors = [mark for mark in launch.marks if mark.kind in ("first_step", "metrics", "rollback")]
    if not anchors:
        return [_Span(launch.start.at, launch.end, "start")]
    first = anchors[0]
    spans = [_Span(launch.start.at, first.at, "start")]
    at, step = first.at, _step(first)
    if first.kind == "rollback":
        step = first.number("to_step")
    waits = _waits(anchors)
    for mark, waited in zip(anchors[1:], waits[1:], strict=True):
        reached = _step(mark)
        # What a rollback takes back is before it; its own step is where the weights were.
        resume = min(mark.resume, mark.number("to_step")) if mark.kind == "rollback" else mark.resume
        spans.append(_Span(at, mark.at, "step", _lost(step, reached, resume), waited))
        at, step = mark.at, mark.number("to_step") if mark.kind == "rollback" else reached
    resume = anchors[-1].resume
    spans.append(_Span(at, launch.end, "step", float(resume <= step), waits[-1]))
    return spans


def _lost(begin: int, end: int, resume: float) -> float:
    """Share of the steps after ``begin`` up to ``end`` that lie after ``resume``."""
    if end <= begin:
        return float(end > resume)
    return min(max(end - max(begin, resume), 0), end - begin) / (end - begin)


def _waits(anchors: list[_Mark]) -> list[float]:
    """Share of waiting in the time before each anchor: that of the next line of metrics, or of the last one."""
    shares: list[float] = []
    share = 0.0
    for mark in anchors:
        share = _wait(mark.metrics) if mark.metrics is not None else share
    for mark in reversed(anchors):
        share = _wait(mark.metrics) if mark.metrics is not None else share
        shares.append(share)
    return shares[::-1]


def _wait(line: Mapping[str, Any]) -> float:
    waited, step_s = line.get("data_wait_s"), line.get("step_s")
    if not is_number(waited) or not is_number(step_s):
        return 0.0
    return min(max(waited / step_s, 0.0), 1.0) if step_s > 0 else 0.0


def _overlays(launch: _Launch) -> list[_Span]:
    """First steps, stalls and evaluations within the attempt's life, one after the other."""
    found = []
    for mark in launch.marks:
        if mark.kind in _SAVES:
            begin = mark.at - round(mark.number("total_s") * _SECOND)
            end, name = min(begin + round(mark.number("stall_s") * _SECOND), mark.at), "checkpoint_stall"
        elif mark.kind in ("evaluation", "first_step"):
            begin, end = mark.at - round(mark.number("seconds") * _SECOND), mark.at
            name = "evaluation" if mark.kind == "evaluation" else "compile"
        else:
            continue
        lost = name != "compile" and mark.number("step") > mark.resume
        found.append(_Span(begin, end, name, float(lost)))
    found.sort(key=lambda span: (span.begin, span.end))
    spans, at = [], launch.start.at
    for span in found:
        begin, end = max(span.begin, at), min(span.end, launch.end)
        if begin < end:
            spans.append(_Span(begin, end, span.name, span.lost))
            at = end
    return spans


def _add(totals: dict[str, int], span: _Span) -> None:
    length = span.end - span.begin
    # The product is a float, which for absurd lengths rounds beyond them.
    lost = min(round(length * span.lost), length)
    waited = min(round((length - lost) * span.waited), length - lost)
    totals["lost"] += lost
    totals["data_wait"] += waited
    totals[span.name] += length - lost - waited

"""The format of ``events.jsonl``: what happened to a run, one JSON object a line, across all its attempts.

Every line has ``time`` (Unix seconds) and ``kind``, and the fields of its kind (:data:`FIELDS`); more fields are
allowed, and lines of an unknown kind are kept and shown. An attempt is one launch of the run; lines are appended.

    start              world_size, layout (object), hosts (list of names), attempt (from 1): processes begin
    first_step         step, seconds: the first step of a stage in this attempt has ended; it compiles and tunes.
                       The attempt's first one says where it goes on from: the step before
    checkpoint         step, stall_s, total_s: a save has ended, total_s after it began; training was held up for
                       its first stall_s, which include a wait for it at the end of the run
    checkpoint_failed  step, stall_s, total_s, reason
    export             step, stall_s, total_s: the same for weights that were exported and are no checkpoint
    evaluation         step, seconds: pictures or scores that training waited for have ended
    skip               step: an update that was left out
    spike              step, loss: a loss far above those before it
    rollback           step, to_step: the weights of to_step are back, and the count of steps with them
    corruption         rank, host: what this rank should hold alike with others differs from most
    straggler          rank, host, factor: its own work takes so many times the median rank's
    stop_signal        signal (its name): the run saves and ends at the next step
    hang               rank, host: no progress within the watchdog's time
    lost_rank          rank: a process or its node is gone
    end                reason, exit_code: the attempt ends by itself; an attempt that is killed has none

Lines of ``metrics.jsonl`` carry ``time`` as well, and may carry ``rank_step_s`` (seconds a step, by rank).
"""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

EVENTS = "events.jsonl"
FAULTS = ("checkpoint_failed", "skip", "spike", "rollback", "corruption", "hang", "lost_rank")
"""Kinds that count as faults; an ``end`` with an exit code that is neither 0 nor :data:`REQUEUE` is one, too."""
REQUEUE = 75
"""Exit code of a run that was stopped, saved, and wants to go on (EX_TEMPFAIL)."""

_NUMBER = (int, float)
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "start": {"world_size": (int,), "layout": (dict,), "hosts": (list,), "attempt": (int,)},
    "first_step": {"step": (int,), "seconds": _NUMBER},
    "checkpoint": {"step": (int,), "stall_s": _NUMBER, "total_s": _NUMBER},
    "checkpoint_failed": {"step": (int,), "stall_s": _NUMBER, "total_s": _NUMBER, "reason": (str,)},
    "export": {"step": (int,), "stall_s": _NUMBER, "total_s": _NUMBER},
    "evaluation": {"step": (int,), "seconds": _NUMBER},
    "skip": {"step": (int,)},
    "spike": {"step": (int,), "loss": _NUMBER},
    "rollback": {"step": (int,), "to_step": (int,)},
    "corruption": {"rank": (int,), "host": (str,)},
    "straggler": {"rank": (int,), "host": (str,), "factor": _NUMBER},
    "stop_signal": {"signal": (str,)},
    "hang": {"rank": (int,), "host": (str,)},
    "lost_rank": {"rank": (int,)},
    "end": {"reason": (str,), "exit_code": (int,)},
}
"""Required fields of each kind, with the types of their values."""
_SIGNED = ("exit_code",)
_LARGEST = 2**63


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at ``time`` (Unix seconds)."""

    time: float
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_number(self.time):
            raise ValueError(f"event {self.kind}: time={self.time!r} must be a finite number of seconds")
        for name, types in FIELDS.get(self.kind, {}).items():
            if name not in self.fields:
                raise ValueError(f"event {self.kind}: {name} is missing")
            value = self.fields[name]
            if types in ((int,), _NUMBER):
                right = is_number(value) and (isinstance(value, int) or types == _NUMBER)
                right = right and (value >= 0 or name in _SIGNED)
            else:
                right = isinstance(value, types)
            if not right:
                raise ValueError(f"event {self.kind}: {name}={value!r} is not allowed")

    def line(self) -> str:
        """Its line of the file, with the newline."""
        return json.dumps({"time": self.time, "kind": self.kind, **self.fields}, allow_nan=False) + "\n"


def parse_event(entry: Mapping[str, Any]) -> Event:
    """The event of a line's object; raises ``ValueError`` naming the field that is missing or wrong."""
    kind = entry.get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"kind={kind!r} must be a name")
    fields = {name: value for name, value in entry.items() if name not in ("time", "kind")}
    return Event(entry.get("time"), kind, fields)  # type: ignore[arg-type]  # checked there


def append_event(folder: Path, event: Event) -> None:
    """Add a line to the folder's file in one write, so that lines of several processes do not mix.

    Raises ``OSError`` where the disk does not take all of it.
    """
    line = event.line().encode()
    file = os.open(folder / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / EVENTS))
    finally:
        os.close(file)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that fits 64 bits of a whole number (a bool is none, nor are nan and inf)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def is_fault(event: Event) -> bool:
    """Whether the event is a fault, or the end of an attempt by one."""
    return event.kind in FAULTS or (event.kind == "end" and event.fields["exit_code"] not in (0, REQUEUE))

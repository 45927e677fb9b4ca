"""The format of ``events.jsonl``: what happened to a run, one JSON object a line, across all its attempts.

Every line has ``time`` (Unix seconds) and ``kind``, and the fields of its kind (:data:`FIELDS`); more fields are
allowed, and lines of an unknown kind are kept and shown. An attempt is one launch of the run; lines are appended.
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
REQUEUE = 75  # exit code of a run that was stopped, saved, and wants to go on (EX_TEMPFAIL)

FIELDS: dict[str, tuple[str, ...]] = {
    # Processes start: layout is an object, hosts a list of names, attempts count from 1.
    "start": ("world_size", "layout", "hosts", "attempt"),
    # The first step of a stage in this attempt has ended; it compiles and tunes. The attempt's first one shows
    # where it resumed: the step before.
    "first_step": ("step", "seconds"),
    # A save has ended, total_s after it started; training was blocked for its first stall_s, which include a wait
    # for it at the end of the run. An export of weights is no checkpoint.
    "checkpoint": ("step", "stall_s", "total_s"),
    "checkpoint_failed": ("step", "stall_s", "total_s", "reason"),
    "export": ("step", "stall_s", "total_s"),
    "evaluation": ("step", "seconds"),  # images or scores that training waited for are done
    "skip": ("step",),  # an update was skipped
    "spike": ("step", "loss"),  # a loss far above those before it
    "rollback": ("step", "to_step"),  # weights and step count are back to those of to_step
    "corruption": ("rank", "host"),  # tensors that should be equal on several ranks differ on this one
    "straggler": ("rank", "host", "factor"),  # its own work takes so many times the median rank's
    "stop_signal": ("signal",),  # its name; the run saves and ends at the next step
    "hang": ("rank", "host"),  # no progress within the watchdog's time
    "lost_rank": ("rank",),  # a process or its node is gone
    "end": ("reason", "exit_code"),  # the attempt ends by itself; one that is killed has none
}
"""Required fields of each kind."""
_TYPES = {"layout": dict, "hosts": list, "reason": str, "host": str, "signal": str}
_FLOATS = ("seconds", "stall_s", "total_s", "loss", "factor")
"""All other fields are whole numbers, and no number but an exit code is negative."""
_MAX = 2**63


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at ``time`` (Unix seconds)."""

    time: float
    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not is_number(self.time):
            raise ValueError(f"event {self.kind}: time={self.time!r} must be a finite number of seconds")
        for name in FIELDS.get(self.kind, ()):
            if name not in self.fields:
                raise ValueError(f"event {self.kind}: {name} is missing")
            value = self.fields[name]
            valid = isinstance(value, _TYPES.get(name, int | float if name in _FLOATS else int))
            if name not in _TYPES:
                valid = valid and is_number(value) and (value >= 0 or name == "exit_code")
            if not valid:
                raise ValueError(f"event {self.kind}: {name}={value!r} is not allowed")

    def line(self) -> str:
        """The event as a line of the file, with the newline."""
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
    with (folder / EVENTS).open("ab", buffering=0) as file:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / EVENTS))


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a finite number below 2**63 in size; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MAX < value < _MAX


def is_fault(event: Event) -> bool:
    """Whether the event is a fault, or the end of an attempt by one."""
    return event.kind in FAULTS or (event.kind == "end" and event.fields["exit_code"] not in (0, REQUEUE))

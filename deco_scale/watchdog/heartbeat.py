"""Heartbeat page: shared memory through which a trainer and its sidecar talk without ever blocking.

The trainer writes heartbeats (count, step, phase) and, once, how it exits; the sidecar writes that it is alive.
The page is a memory file whose descriptor the sidecar inherits.
"""

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal["start", "step", "long_op"]
"""Start-up; a step or a wait for data; what may take long (a first step, checkpoints, samples, evaluation)."""
PHASES: tuple[Phase, ...] = get_args(Phase)
_REASON_BYTES = 15 * 1024


class _Page(ctypes.Structure):
    _fields_ = [
        ("count", ctypes.c_uint64),
        ("step", ctypes.c_int64),
        ("phase", ctypes.c_uint64),
        ("alive_count", ctypes.c_uint64),
        ("closing", ctypes.c_uint64),
        ("uncertain", ctypes.c_uint64),
        ("exited", ctypes.c_uint64),
        ("exit_code", ctypes.c_int64),
        ("reason_bytes", ctypes.c_uint64),
        ("reason", ctypes.c_ubyte * _REASON_BYTES),
    ]


@dataclass(frozen=True, slots=True)
class Beat:
    """The ``count``-th heartbeat, given at the start of ``phase`` of ``step``."""

    count: int
    step: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class ExitReport:
    """How the trainer says that it exits; ``uncertain``: another rank may be the cause."""

    reason: str
    code: int
    uncertain: bool = False


class HeartbeatPage:
    """The mapped page; the trainer makes it with :meth:`create`, the sidecar maps the same descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._page = _Page.from_buffer(mmap.mmap(descriptor, ctypes.sizeof(_Page)))

    @classmethod
    def create(cls) -> "HeartbeatPage":
        """A new page of zeros: no heartbeat yet, phase ``start``."""
        descriptor = os.memfd_create("watchdog", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, ctypes.sizeof(_Page))
        return cls(descriptor)

    def beat(self, step: int, phase: Phase) -> None:
        self._page.step, self._page.phase = step, PHASES.index(phase)
        self._page.count += 1

    def last_beat(self) -> Beat:
        """The last one; read while the trainer writes it, it may mix two, until it is read again."""
        return Beat(self._page.count, self._page.step, PHASES[self._page.phase])

    def report_exit(self, reason: str, code: int) -> None:
        """Say how the trainer exits; later calls change nothing."""
        if self._page.exited:
            return
        text = reason.encode(errors="replace")[:_REASON_BYTES]
        self._page.reason[: len(text)] = text
        self._page.exit_code, self._page.reason_bytes = code, len(text)
        self._page.exited = 1

    def exit_report(self) -> ExitReport | None:
        if not self._page.exited:
            return None
        reason = bytes(self._page.reason[: self._page.reason_bytes]).decode(errors="replace")
        return ExitReport(reason, self._page.exit_code, bool(self._page.uncertain))

    def mark_uncertain(self) -> None:
        """The trainer waits to hear whether another rank caused its error."""
        self._page.uncertain = 1

    def request_close(self) -> None:
        """The trainer waits for the sidecar to exit."""
        self._page.closing = 1

    @property
    def closing(self) -> bool:
        return bool(self._page.closing)

    def mark_alive(self) -> None:
        """The sidecar is alive."""
        self._page.alive_count += 1

    @property
    def alive_count(self) -> int:
        return int(self._page.alive_count)

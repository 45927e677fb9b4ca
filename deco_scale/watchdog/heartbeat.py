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


@dataclass(frozen=True, slots=True)
class ExitReport:
    """How the trainer says that it exits; ``uncertain``: another rank may be the cause."""

    reason: str
    code: int
    uncertain: bool = False


class HeartbeatPage(ctypes.Structure):
    """The page; the trainer makes it with :meth:`create`, the sidecar maps the same descriptor.

    ``count`` heartbeats were given, the last one at the start of ``phase`` (its index) of ``step``; read while the
    trainer writes, it may mix two. The sidecar counts up ``alive_count``. The trainer sets ``closing`` while it
    waits for the sidecar to exit, and ``uncertain`` while it waits to hear whether another rank caused its error.
    """

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

    @classmethod
    def map(cls, descriptor: int) -> "HeartbeatPage":
        """The page behind a descriptor."""
        page = cls.from_buffer(mmap.mmap(descriptor, ctypes.sizeof(cls)))
        page.descriptor = descriptor
        return page

    @classmethod
    def create(cls) -> "HeartbeatPage":
        """A new page of zeros: no heartbeat yet, phase ``start``."""
        descriptor = os.memfd_create("watchdog", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, ctypes.sizeof(cls))
        return cls.map(descriptor)

    def beat(self, step: int, phase: Phase) -> None:
        self.step, self.phase = step, PHASES.index(phase)
        self.count += 1

    def report_exit(self, reason: str, code: int) -> None:
        """Say how the trainer exits; later calls change nothing."""
        if self.exit_report() is None:
            text = reason.encode(errors="replace")[:_REASON_BYTES]
            self.reason[: len(text)] = text
            self.exit_code, self.reason_bytes = code, len(text)
            self.exited = 1

    def exit_report(self) -> ExitReport | None:
        if not self.exited:
            return None
        reason = bytes(self.reason[: self.reason_bytes]).decode(errors="replace")
        return ExitReport(reason, self.exit_code, bool(self.uncertain))

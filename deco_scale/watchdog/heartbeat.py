"""Heartbeat page: shared memory through which a trainer and its sidecar talk without ever blocking.

The trainer writes heartbeats (count, step, phase) and, once, how it exits; the sidecar writes that it is alive.
The page is a memory file whose descriptor the sidecar inherits.
"""

import ctypes
import mmap
import os
from typing import Any, Literal, get_args

Phase = Literal["start", "step", "long_op"]
"""Start-up; a step or a wait for data; what may take long (a first step, checkpoints, samples, evaluation)."""
PHASES: tuple[Phase, ...] = get_args(Phase)
MAX_REASON = 2000  # characters of an error's reason
_REASON_BYTES = 4 * MAX_REASON


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
    exited: int

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
        if not self.exited:
            text = reason.encode(errors="replace")[:_REASON_BYTES]
            self.reason[: len(text)] = text
            self.exit_code, self.reason_bytes = code, len(text)
            self.exited = 1

    def state(self) -> dict[str, Any]:
        """The trainer's part of a :class:`~deco_scale.watchdog.diagnosis.RankReport`."""
        state: dict[str, Any] = {"step": self.step, "phase": PHASES[self.phase]}
        if self.exited:
            reason = bytes(self.reason[: self.reason_bytes]).decode(errors="replace")[:MAX_REASON]
            state |= {"phase": "end", "reason": reason, "code": self.exit_code, "uncertain": bool(self.uncertain)}
        return state

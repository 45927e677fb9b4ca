"""What a trainer says to its companion: a page of shared memory, which nobody can block on.

The trainer writes beats (how often, in which step and phase) and, once, that it ends; the companion writes that it
is awake. The page is a memory file whose descriptor the companion inherits.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from typing import Literal

Phase = Literal["start", "step", "slow"]
PHASES: tuple[Phase, ...] = ("start", "step", "slow")
"""Start-up; a step or a wait for data; what may take long (a first step, checkpoints, pictures, evaluation)."""

_BEAT = struct.Struct("@QqQ")  # beats so far, step, index of the phase
_AWAKE = struct.Struct("@Q")  # how often the companion looked
_CLOSING = struct.Struct("@Q")
_UNSURE = struct.Struct("@Q")
_ENDED = struct.Struct("@QqQ")  # whether, exit code, bytes of the reason
_AT_BEAT, _AT_AWAKE, _AT_CLOSING, _AT_UNSURE, _AT_ENDED, _AT_REASON = 0, 64, 128, 192, 256, 320
_SIZE = 16 * 1024


@dataclass(frozen=True, slots=True)
class Beat:
    """The ``count``-th sign of progress, given in ``phase`` of ``step``."""

    count: int
    step: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class End:
    """The trainer's word that it ends, with this exit code; ``unsure``: another rank may be the cause."""

    reason: str
    code: int
    unsure: bool = False


class Board:
    """The page, mapped; the trainer makes it with :meth:`create`, the companion maps the same descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._page = mmap.mmap(descriptor, _SIZE)
        self._count = 0

    @classmethod
    def create(cls) -> "Board":
        """A new page of zeros: no beat yet, phase ``start``."""
        descriptor = os.memfd_create("watchdog", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, _SIZE)
        return cls(descriptor)

    def beat(self, step: int, phase: Phase) -> None:
        self._count += 1
        _BEAT.pack_into(self._page, _AT_BEAT, self._count, step, PHASES.index(phase))

    def last_beat(self) -> Beat:
        before = _BEAT.unpack_from(self._page, _AT_BEAT)
        for _ in range(10):
            found = _BEAT.unpack_from(self._page, _AT_BEAT)
            if found == before:
                break
            before = found
        count, step, phase = before
        return Beat(count, step, PHASES[min(phase, len(PHASES) - 1)])

    def end(self, reason: str, code: int) -> None:
        """Say it once; what is said first stands."""
        if self.ended() is not None:
            return
        text = reason.encode(errors="replace")[: _SIZE - _AT_REASON]
        self._page[_AT_REASON : _AT_REASON + len(text)] = text
        _ENDED.pack_into(self._page, _AT_ENDED, 0, code, len(text))
        _ENDED.pack_into(self._page, _AT_ENDED, 1, code, len(text))

    def ended(self) -> End | None:
        said, code, length = _ENDED.unpack_from(self._page, _AT_ENDED)
        if not said:
            return None
        reason = self._page[_AT_REASON : _AT_REASON + length].decode(errors="replace")
        return End(reason, code, bool(_UNSURE.unpack_from(self._page, _AT_UNSURE)[0]))

    def doubt(self) -> None:
        """The trainer waits to hear whether another rank is the cause of its end."""
        _UNSURE.pack_into(self._page, _AT_UNSURE, 1)

    def ask_to_leave(self) -> None:
        """The trainer waits for the companion's end."""
        _CLOSING.pack_into(self._page, _AT_CLOSING, 1)

    @property
    def leaving(self) -> bool:
        return bool(_CLOSING.unpack_from(self._page, _AT_CLOSING)[0])

    def look(self) -> None:
        """The companion is awake."""
        _AWAKE.pack_into(self._page, _AT_AWAKE, self.looks + 1)

    @property
    def looks(self) -> int:
        return int(_AWAKE.unpack_from(self._page, _AT_AWAKE)[0])

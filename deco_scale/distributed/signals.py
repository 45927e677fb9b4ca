"""Stopping in time: a signal to any rank ends the run on all of them, after a checkpoint."""

import signal
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they end a job."""


class StopRequest:
    """Notes a signal, and lets all ranks learn of it at the same step; a second signal ends the process."""

    def __init__(self) -> None:
        self._here = 0
        self.met: str | None = None
        """What :meth:`agreed` found, once it has."""
        self._asked: tuple[Tensor, dist.Work | None] | None = None

    def install(self) -> None:
        """Take over :data:`SIGNALS` in this process; to be called in its main thread."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def agreed(self) -> bool:
        """Whether some rank had met a signal at its last call, told to every rank at once; :attr:`met` names it.

        Each call begins a reduction that the next one waits for, so that it passes beside a step.
        """
        if self._asked is not None:
            value, work = self._asked
            if work is not None:
                work.wait()
            if int(value):
                self.met = signal.Signals(int(value)).name
                return True
        value = torch.tensor(self._here)
        work = None
        if dist.get_world_size() > 1:
            work = dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True)
        self._asked = value, work
        return False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._here:
            # Whoever asks twice does not want to wait for a step.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._here = number

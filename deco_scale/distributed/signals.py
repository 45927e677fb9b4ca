"""Graceful stop: a signal to any rank makes all ranks save a checkpoint and stop at the same step."""

import signal
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor


class StopRequest:
    """Records a signal and shares it between ranks; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        """Name of the signal, once :meth:`poll` has returned True."""
        self._received = 0
        self._pending: tuple[Tensor, dist.Work | None] | None = None

    def install(self) -> None:
        """Handle what schedulers send before they end a job; call it in the main thread."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def poll(self) -> bool:
        """Whether any rank had received a signal by the previous call; a collective, the same on every rank.

        Each call starts an asynchronous reduction that the next one waits for, so that it overlaps with a step.
        """
        if self._pending is not None:
            value, work = self._pending
            if work is not None:
                work.wait()
            if int(value):
                self.signal_name = signal.Signals(int(value)).name
                return True
        value = torch.tensor(self._received)
        work = None
        if dist.get_world_size() > 1:
            work = dist.all_reduce(value, dist.ReduceOp.MAX, async_op=True)
        self._pending = value, work
        return False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            # The second request is not to wait for a step.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._received = number

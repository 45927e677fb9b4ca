"""How a training process ends: errors become exit codes, messages and the watchdog's reports."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from data_pipeline.errors import DataError
from deco_scale.config import RunConfig
from deco_scale.distributed.bootstrap import Environment
from deco_scale.distributed.collectives import broadcast_object
from deco_scale.errors import ConfigError, RunError, Stopped
from deco_scale.observability.events import REQUEUE, Event, append_event
from deco_scale.observability.redact import scrub
from deco_scale.watchdog.client import NoWatchdog, Watchdog

VERDICT_S = 15.0
"""How long a rank with an unexpected error waits to learn whether another rank was lost."""


class ExitStatus:
    """A context that handles the errors of a launch: prints them once, reports to the watchdog, sets :attr:`code`.

    Codes: 0 done, 1 the run failed, 2 wrong use or configuration, 75 stopped by a signal after a checkpoint, 130
    interrupted.
    """

    def __init__(self) -> None:
        self.code = 0
        self.env = Environment(0, 1, 0)
        self.run_dir: Path | None = None
        self.watchdog: Watchdog = NoWatchdog()

    def start_watchdog(self, cfg: RunConfig) -> Watchdog:
        """Start this rank's watchdog, which is told of the end; all ranks together."""
        self.watchdog = Watchdog.start(
            cfg.watchdog,
            rank=self.env.rank,
            world_size=self.env.world_size,
            run_dir=Path(cfg.run.dir),
            share=broadcast_object,
            webhook_env=cfg.monitor.webhook_env,
        )
        return self.watchdog

    def __enter__(self) -> "ExitStatus":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        reason = "done"
        if isinstance(error, Stopped):
            reason, self.code = str(error), REQUEUE
        elif isinstance(error, ConfigError | RunError | DataError):
            reason, self.code = str(error), getattr(error, "exit_code", 1)
            self._show(error)
        elif isinstance(error, KeyboardInterrupt):
            reason, self.code = "interrupted", 130
        elif isinstance(error, Exception):
            # A bug, or what remains of a collective when another rank is lost: the watchdog knows which.
            sys.excepthook(type(error), error, trace)
            reason, self.code = f"{type(error).__name__}: {error}", 1
            self.watchdog.report_exit(reason, self.code)
            self.watchdog.wait_for_verdict(VERDICT_S)
            self._record_end(reason)
        elif error is not None:
            return False
        self.watchdog.report_exit(reason, self.code)
        self.watchdog.close()
        return True

    def _show(self, error: Exception) -> None:
        """Errors that all ranks share are shown once per node; a rank that is alone with one names itself."""
        if self.env.local_rank == 0 or isinstance(error, DataError):
            where = f" [rank {self.env.rank} on {socket.gethostname()}]" if self.env.rank else ""
            print(scrub(f"error{where}: {error}"), file=sys.stderr, flush=True)

    def _record_end(self, reason: str) -> None:
        """The event of an end without a name; one that came from a lost rank has the watchdog's event."""
        if self.env.rank == 0 and self.run_dir is not None:
            with suppress(OSError):
                fields = {"reason": scrub(reason), "exit_code": self.code}
                append_event(self.run_dir, Event(time.time(), "end", fields))


@contextmanager
def leave_group_in_order() -> Iterator[None]:
    """Ranks that are done, or were stopped by a signal, leave the process group together."""
    stopped: Stopped | None = None
    try:
        yield
    except Stopped as signal:
        stopped = signal
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if stopped is not None:
        raise stopped


def exit_now(code: int) -> None:
    """End the process without waiting for ranks that may be in a collective that will never complete."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

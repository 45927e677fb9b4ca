"""Work of all ranks beside the training step: a group of its own, and one job at a time."""

import datetime
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from deco_scale.errors import ConfigError, RunError

TIMEOUT = datetime.timedelta(hours=6)
"""For ranks whose disk or network is slow; one that is gone is noticed at once, by its closed connections."""

T = TypeVar("T")


class CheckpointGroup:
    """What the ranks tell each other about a save; never over the group that the training step uses.

    The default group serves where the caller waits for the save and that group can send host memory.
    """

    def __init__(self, *, apart: bool) -> None:
        """All ranks together. ``apart`` makes a gloo group, which a thread may use while training goes on."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        apart = apart or "gloo" not in dist.get_backend_config()
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=TIMEOUT) if apart else None

    def gather(self, mine: T) -> list[T]:
        """Something of every rank, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def agree(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank; where it fails on any, all raise the first rank's error as RunError."""
        result: T | None = None
        problem: str | None = None
        try:
            result = action()
        except (ConfigError, RunError) as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename or 'a file'}: {error.strerror or error}"
        for rank, found in enumerate(self.gather(problem)):
            if found is not None:
                raise RunError(f"rank {rank}: {found}" if rank else found)
        return result  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """How a task ended: a line for the log, or the error that all ranks share."""

    message: str
    error: str | None
    total_s: float


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """The end of a save: a line for the log, the error if it failed, how long it took and held the step up.

    ``checkpoint`` is False where weights alone were exported.
    """

    message: str
    error: str | None
    checkpoint: bool
    step: int
    stall_s: float
    total_s: float


class BackgroundTask:
    """One thread, one job at a time; jobs that fail with a :class:`RunError` end with it in their outcome.

    Any other exception of a job is a bug or a lost rank, and is raised by :meth:`wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._outcome: TaskResult | None = None
        self._bug: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], str], *, began: float, inline: bool) -> None:
        """Run ``job``, in the caller's thread where ``inline``; ``began`` is when it was wanted."""
        assert self._thread is None and self._outcome is None

        def work() -> None:
            message, error = "", None
            try:
                message = job()
            except RunError as failure:
                error = str(failure)
            except BaseException as bug:
                self._bug = bug
            self._outcome = TaskResult(message=message, error=error, total_s=time.perf_counter() - began)

        if inline:
            work()
        else:
            # Daemonic, so that a process that ends by another error does not hang in it.
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()

    def wait(self) -> TaskResult | None:
        """The outcome of the job since the last call, None if there was none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        bug, self._bug = self._bug, None
        outcome, self._outcome = self._outcome, None
        if bug is not None:
            raise bug
        return outcome


def first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    """Rank and exception behind what DCP raises on every rank."""
    rank, wrapped = next(iter(error.failures.items()))
    return rank, wrapped[0]

"""A save on a thread beside the training step: one task at a time."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from deco_scale.errors import RunError


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """How a task ended: a line for the log, or the error that all ranks share."""

    message: str
    error: str | None
    total_s: float


@dataclass(frozen=True, kw_only=True)
class SaveResult(TaskResult):
    """How a save ended: also its step, and for how long it stalled training.

    ``checkpoint`` is False where only the weights were exported.
    """

    checkpoint: bool
    step: int
    stall_s: float


class BackgroundTask:
    """One thread, one task at a time; a task's :class:`RunError` becomes the error of its result.

    Any other exception of a task is a bug or a lost rank, and is raised by :meth:`wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._result: TaskResult | None = None
        self._bug: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, task: Callable[[], str], *, start_time: float, inline: bool) -> None:
        """Run ``task``, in the caller's thread if ``inline``; its duration counts from ``start_time``."""
        assert self._thread is None and self._result is None

        def run() -> None:
            message, error = "", None
            try:
                message = task()
            except RunError as failure:
                error = str(failure)
            except BaseException as bug:
                self._bug = bug
            self._result = TaskResult(message=message, error=error, total_s=time.perf_counter() - start_time)

        if inline:
            run()
        else:
            # A daemon thread, so that a process that ends with another error does not hang in it.
            self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
            self._thread.start()

    def wait(self) -> TaskResult | None:
        """The result of the task since the last call, None if there was none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        bug, self._bug = self._bug, None
        result, self._result = self._result, None
        if bug is not None:
            raise bug
        return result

"""Work that may never end, such as a request to a service or a write to a network's disk."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of ``work`` in a thread of its own, which is abandoned after ``seconds``: ``TimeoutError``.

    Raises what ``work`` does. The thread does not hold up the end of the process.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def problem_within(seconds: float, work: Callable[[], object]) -> str | None:
    """As :func:`within`, but returns why the work was not done, in one line; never raises."""
    try:
        within(seconds, work)
    except TimeoutError:
        return f"not done within {seconds:g} s"
    except Exception as error:  # it is never worth more than what waits for it
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None

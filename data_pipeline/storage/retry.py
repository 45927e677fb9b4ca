"""When a request that failed is tried again: how soon, for how long, and how often in all.

Three bounds that do different work. Backoff with full jitter (Brooker, "Exponential Backoff and Jitter", AWS 2015)
spreads the readers of a cluster apart. A budget shared by all readers of a store keeps retries from multiplying
the load of a server that is already in trouble. A deadline per request ends it.
"""

import random
import threading
import time

from data_pipeline.errors import StoreError

BASE_WAIT_S = 0.2
MAX_WAIT_S = 10.0
FLOOR_BYTES_PER_S = 64 * 1024
"""A transfer slower than this is no progress: of 32 at once it is 2 MB/s for a whole node."""
BUDGET, REFUND, TOKENS_PER_S = 100.0, 0.5, 4.0


class RetryBudget:
    """A token bucket of ``BUDGET``: a retry takes a token, a success gives back ``REFUND``, time ``TOKENS_PER_S``.

    An empty bucket delays retries and never fails a request: a training run would rather wait than end. (The AWS
    SDKs fail, and give back 10% of a retry per success, which bears one fault in 11 requests.) At a fault rate p,
    p <= (1 - p) / 2 holds up to p = 1/3 without any delay; above it, retries add at most half the load of what
    succeeds, plus 4 a second. In an outage a process asks 4 times a second, however many readers it has.
    """

    def __init__(self) -> None:
        self._tokens, self._updated = BUDGET, time.monotonic()
        self._lock = threading.Lock()

    def spend(self) -> float:
        """Take a token; returns the seconds to wait until it is there (0 while the bucket is not empty)."""
        with self._lock:
            now = time.monotonic()
            self._tokens = min(BUDGET, self._tokens + (now - self._updated) * TOKENS_PER_S) - 1
            self._updated = now
            return max(0.0, -self._tokens / TOKENS_PER_S)

    def succeed(self) -> None:
        """Note a request that went well."""
        with self._lock:
            self._tokens = min(BUDGET, self._tokens + REFUND)


class Backoff:
    """Waits between the attempts of one request and ends it with a :class:`StoreError` when time is up.

    Progress is a received byte, and each moves the deadline by 1 / ``FLOOR_BYTES_PER_S``, no more: a request for
    n bytes lasts at most ``deadline_s + n / FLOOR_BYTES_PER_S`` plus one timeout of a socket, and a server that
    drips a byte now and then gains nothing. Progress also starts the waits anew, from ``BASE_WAIT_S``.
    """

    def __init__(self, name: str, deadline_s: float, budget: RetryBudget) -> None:
        self._name, self._budget, self._start = name, budget, time.monotonic()
        self._deadline = self._start + deadline_s
        self._attempts = self._fruitless = self._bytes = 0

    @property
    def overdue(self) -> bool:
        return time.monotonic() >= self._deadline

    def progress(self, num_bytes: int) -> None:
        """Note bytes that arrived."""
        self._bytes += num_bytes
        self._deadline += num_bytes / FLOOR_BYTES_PER_S
        self._fruitless = 0

    def wait(self, fault: str) -> None:
        """Sleep before the next attempt, not beyond the deadline; past it, raise :class:`StoreError`."""
        self._attempts += 1
        now = time.monotonic()
        if now >= self._deadline:
            raise StoreError(
                f"{self._name}: gave up after {now - self._start:.1f} s and {self._attempts} attempts with "
                f"{self._bytes} bytes received; the last fault: {fault}; check the server and the network"
            ) from None
        jitter = random.uniform(0.0, min(MAX_WAIT_S, BASE_WAIT_S * 2.0 ** min(self._fruitless, 30)))
        self._fruitless += 1
        time.sleep(min(max(jitter, self._budget.spend()), self._deadline - now))

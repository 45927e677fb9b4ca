"""Settings of the watchdog."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """How long a rank may be without progress before the job is ended; ``timeout_s`` 0 turns the watchdog off.

    ``timeout_s`` is for a step (and a wait for data), ``slow_timeout_s`` for what may take long: start-up, a
    stage's first step, checkpoints, sample images and evaluation. Shorter than ``data.deadline_s``, it ends a run
    whose object store is away before the data do.
    """

    timeout_s: float = 600.0
    slow_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if not 0 <= self.timeout_s < float("inf"):
            raise ValueError(f"timeout_s={self.timeout_s} must be 0 (off) or a positive number of seconds")
        if not self.timeout_s <= self.slow_timeout_s < float("inf"):
            raise ValueError(f"slow_timeout_s={self.slow_timeout_s} must be at least timeout_s={self.timeout_s}")

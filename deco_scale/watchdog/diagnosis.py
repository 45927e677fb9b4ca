"""Whether the job must end, and because of which rank: reports of ranks go in, at most one fault comes out.

No clocks, processes or sockets here. Causes, the likelier one first, since each can produce those below it on
other ranks:

1. the process exited without reporting why
2. the process is stopped
3. the sidecar is lost, and most often its node with it
4. no progress; of several ranks, the one furthest behind
5. the rank reported that it exits with an error of its own
6. the rank reported that it exits with an error that another rank may have caused

After the first sign nothing is decided for :data:`SETTLE_S`, so that a cause that arrives after its effects still
counts, and for :data:`GRACE_S` if there are only errors of the last kind: a process with much memory takes long to
exit. A rank that waits in a step for another one in a long operation is not overdue.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.heartbeat import Phase

SETTLE_S = 1.0
GRACE_S = 5.0  # how long the other ranks may take to exit by themselves after one reported an error
MIN_SILENCE_S = 5.0  # a sidecar may always be silent for this long, however short the watchdog's timeout
NO_FAULT = (0, 75)  # exit codes of a run that is done, or was stopped and saved
EXITED, STOPPED, SIDECAR_LOST, NO_PROGRESS, ERROR, UNCERTAIN_ERROR = range(1, 7)
CONNECTION_LOST = "is lost: the connection to its sidecar is closed"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReport:
    """A rank as its sidecar sees it.

    ``phase`` is the trainer's, or ``end`` once it reported that it exits with ``code``; ``silent_s`` counts from
    its last heartbeat; ``state`` is the letter of /proc, and ``stopped_s`` how long it has been that of a stopped
    process; ``gone``: the process has exited. ``uncertain``: another rank may have caused its error.
    """

    rank: int
    phase: Literal[Phase, "end"] = "start"
    step: int = 0
    silent_s: float = 0.0
    state: str = "R"
    stopped_s: float = 0.0
    gone: bool = False
    code: int | None = None
    reason: str = ""
    uncertain: bool = False

    @property
    def stopped(self) -> bool:
        """Whether a signal or a debugger stopped the process."""
        return not self.gone and self.state[:1] in ("T", "t")

    @property
    def failed(self) -> bool:
        """Whether it reported an exit code that is a fault."""
        return self.code is not None and self.code not in NO_FAULT

    @property
    def location(self) -> str:
        return {
            "start": "during start-up",
            "step": f"in step {self.step}",
            "long_op": f"in a long operation (first step, checkpoint, samples, evaluation) at step {self.step}",
            "end": f"after it reported its exit (exit code {self.code})",
        }[self.phase]


@dataclass(frozen=True, slots=True)
class Fault:
    """The job ends because of ``rank``: ``how`` completes a sentence that begins with the rank.

    ``code`` is the exit code that the other ranks take over from an ``error``.
    """

    kind: Literal["lost", "hang", "error"]
    rank: int
    how: str
    code: int = 1


@dataclass(slots=True)
class _Rank:
    report: RankReport
    heard_at: float
    excused_at: float = float("-inf")
    lost: str | None = None
    left: bool = False
    gone_at: float = 0.0
    failed_at: float = float("inf")

    @property
    def present(self) -> bool:
        """Whether its process is still there, as far as known."""
        return not (self.left or self.report.gone or self.lost is not None)

    @property
    def in_long_op(self) -> bool:
        return self.report.phase in ("start", "long_op")

    def overdue(self, cfg: WatchdogConfig) -> bool:
        """Whether it made no progress for too long, not counting time when it waited for others with an excuse."""
        timeout_s = cfg.slow_timeout_s if self.in_long_op else cfg.timeout_s
        waiting_s = min(self.report.silent_s, self.heard_at - self.excused_at)
        return waiting_s > timeout_s or self.report.stopped_s > cfg.timeout_s

    def hang(self) -> Fault:
        report = self.report
        stopped = f"; it is stopped (state {report.state})" if report.stopped else ""
        how = f"made no progress for {report.silent_s:.1f} s {report.location}{stopped}"
        return Fault("hang", report.rank, how)


_Sign = tuple[tuple[float, ...], Fault]  # a fault with its order among the possible causes


class Diagnosis:
    """The state of the job. Times are seconds on any one clock that does not go back."""

    def __init__(self, ranks: Iterable[int], cfg: WatchdogConfig, *, now: float) -> None:
        self._cfg = cfg
        self._ranks = {rank: _Rank(RankReport(rank=rank), now) for rank in ranks}
        self._first_sign: float | None = None
        self._cause: Fault | None = None
        self._done = False

    def update(self, now: float, report: RankReport) -> None:
        rank = self._ranks[report.rank]
        rank.heard_at = now
        if report.gone and not rank.report.gone:
            rank.gone_at = now
        if report.failed and rank.report.code is None:
            rank.failed_at = now
        rank.report = report

    def mark_lost(self, rank: int, how: str) -> None:
        """The connection to the rank's sidecar closed without a goodbye; no fault if its exit was reported."""
        state = self._ranks[rank]
        if state.report.code is not None:
            state.left = True
        elif not state.left and state.lost is None:
            state.lost = how

    def mark_left(self, rank: int) -> None:
        self._ranks[rank].left = True

    def last_report(self, rank: int) -> RankReport:
        return self._ranks[rank].report

    def silent(self, rank: int, now: float) -> bool:
        """Whether the rank's sidecar has said nothing for so long that the rank is lost."""
        return now - self._ranks[rank].heard_at > max(self._cfg.timeout_s, MIN_SILENCE_S)

    @property
    def finished(self) -> bool:
        """Whether no rank is present any more."""
        return not any(rank.present for rank in self._ranks.values())

    @property
    def suspicious(self) -> bool:
        """Whether there is a first sign of a fault."""
        return self._first_sign is not None and not self._done

    def check(self, now: float) -> Fault | None:
        """The fault, once."""
        if self._done:
            return None
        self._excuse_waiting(now)
        if self._cause is None:
            signs = list(self._signs(now))
            if not signs:
                self._first_sign = None
                return None
            self._first_sign = now if self._first_sign is None else self._first_sign
            if now - self._first_sign < SETTLE_S:
                return None
            order, cause = min([*signs, *self._stopped()], key=lambda sign: sign[0])
            if order[0] == UNCERTAIN_ERROR and self._in_grace(now):
                return None
            self._cause = cause
        if self._cause.kind == "error" and (self.finished or self._in_grace(now)):
            return None
        self._done = True
        return self._cause

    def _in_grace(self, now: float) -> bool:
        """Whether some rank still has time to exit by itself after another one's error."""
        running = any(rank.present and rank.report.code is None for rank in self._ranks.values())
        return running and now - (self._first_sign or 0) < GRACE_S

    def _excuse_waiting(self, now: float) -> None:
        """A rank in a step may wait for one in a long operation of that step or an earlier one, still in time."""
        long_ops = [
            rank.report.step
            for rank in self._ranks.values()
            if rank.present and rank.in_long_op and not rank.overdue(self._cfg)
        ]
        for rank in self._ranks.values():
            if long_ops and not rank.in_long_op and rank.report.step >= min(long_ops):
                rank.excused_at = now

    def _signs(self, now: float) -> Iterator[_Sign]:
        """What is wrong now."""
        # A rank that fell silent after another one's error waits for that rank.
        first_failure = min((rank.failed_at for rank in self._ranks.values()), default=float("inf"))
        for number, rank in self._ranks.items():
            report = rank.report
            if report.failed:
                how = f"ended with an error (exit code {report.code}): {report.reason}"
                order = UNCERTAIN_ERROR if report.uncertain else ERROR
                yield (order, rank.failed_at, number), Fault("error", number, how, report.code or 1)
            elif report.gone and report.code is None:
                how = f"exited without reporting why (killed, or out of memory?) {report.location}"
                yield (EXITED, rank.gone_at, number), Fault("lost", number, how)
            if rank.left or report.gone:
                continue
            if rank.lost is not None:
                yield (SIDECAR_LOST, 0, number), Fault("lost", number, rank.lost)
            elif self.silent(number, now):
                how = f"is lost: its sidecar has been silent for {now - rank.heard_at:.1f} s"
                yield (SIDECAR_LOST, 1, number), Fault("lost", number, how)
            elif rank.overdue(self._cfg) and now - report.silent_s <= first_failure - SETTLE_S:
                yield (NO_PROGRESS, report.step, -report.silent_s, number), rank.hang()

    def _stopped(self) -> Iterator[_Sign]:
        """Stopped ranks: no sign of a fault before their timeout, but a likely cause of one."""
        for number, rank in self._ranks.items():
            if rank.present and rank.report.stopped and rank.report.stopped_s >= SETTLE_S:
                yield (STOPPED, -rank.report.stopped_s, number), rank.hang()

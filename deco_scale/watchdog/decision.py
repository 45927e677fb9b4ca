"""Whether the job must end, and because of which rank: what ranks report goes in, at most one verdict comes out.

No clocks, processes or sockets here. What can be wrong with a rank, the likelier cause first, since each of them
can bring about those below it on other ranks:

1. its process is gone without a word
2. its process is stopped
3. its companion is lost, and most often its node with it
4. it makes no progress; of several, the one furthest behind
5. it said that it ends with an error of its own
6. it said that it ends with an error that may come from another rank

After the first sign nothing is decided for :data:`SETTLE_S`, so that the cause can arrive behind its effects, and
for :data:`GRACE_S` if there are only errors of the last kind: a process with much memory takes long to be gone. A
rank that waits in a step for another one that is in a slow phase is not overdue.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deco_scale.watchdog.settings import WatchdogConfig

SETTLE_S = 1.0
GRACE_S = 5.0
"""How long the others may take to end by themselves after a rank has said that it ends with an error."""
LEAST_SILENCE_S = 5.0
"""A companion may be silent for this long, however short the watchdog's time is."""
NO_FAULT = (0, 75)
"""Exit codes of a run that is done, or was stopped and saved."""
UNSURE = 6
"""The last place in the order of causes."""
STOPPED = "Tt"
"""States of a process that does not run: by a signal, or by a debugger."""

Kind = Literal["lost", "hang", "error"]
_PHASES = ("start", "step", "slow", "end")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A rank as its companion sees it.

    ``phase`` is the trainer's, or ``end`` once it has said that it ends with ``code``; ``silent_s`` counts from
    its last sign of progress; ``state`` is the letter of /proc, held for ``stopped_s`` if it is one of
    :data:`STOPPED`; ``gone``: the process has ended. ``unsure``: another rank may be the cause of its end.
    """

    rank: int
    phase: str = "start"
    step: int = 0
    silent_s: float = 0.0
    state: str = "R"
    stopped_s: float = 0.0
    gone: bool = False
    code: int | None = None
    reason: str = ""
    unsure: bool = False

    def __post_init__(self) -> None:
        if self.phase not in _PHASES:
            raise ValueError(f"phase={self.phase!r} is none of {', '.join(_PHASES)}")

    @property
    def stopped(self) -> bool:
        return not self.gone and self.state[:1] in tuple(STOPPED)

    @classmethod
    def parse(cls, rank: int, raw: Mapping[str, Any]) -> "Report":
        """From a message; raises ``ValueError`` or ``TypeError`` where it is none."""
        code = raw.get("code")
        return cls(
            rank=rank,
            phase=str(raw.get("phase")),
            step=int(raw.get("step", 0)),
            silent_s=float(raw.get("silent_s", 0)),
            state=str(raw.get("state", "?"))[:1],
            stopped_s=float(raw.get("stopped_s", 0)),
            gone=bool(raw.get("gone")),
            code=None if code is None else int(code),
            reason=str(raw.get("reason", "")),
            unsure=bool(raw.get("unsure")),
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """The job ends because of ``rank``: ``how`` is the end of a sentence that begins with the rank.

    ``code`` is the exit code that the others take over from an ``error``.
    """

    kind: Kind
    rank: int
    how: str
    code: int = 1


@dataclass(slots=True)
class _Rank:
    report: Report
    heard: float
    excused: float = float("-inf")
    lost: str | None = None
    left: bool = False
    gone_at: float = 0.0
    failed_at: float = 0.0

    @property
    def present(self) -> bool:
        """Whether its process is there, as far as one can tell."""
        return not (self.left or self.report.gone or self.lost is not None)

    @property
    def waiting_s(self) -> float:
        """Time without progress, less what it waited for others with an excuse."""
        return min(self.report.silent_s, self.heard - self.excused)


class Decision:
    """The state of the job. Times are seconds on any one clock that does not go back."""

    def __init__(self, ranks: Iterable[int], cfg: WatchdogConfig, *, now: float) -> None:
        self._cfg = cfg
        self._ranks = {rank: _Rank(Report(rank=rank), now) for rank in ranks}
        self._first: float | None = None
        self._cause: Verdict | None = None
        self._given = False

    def hear(self, now: float, report: Report) -> None:
        """A report of a rank; what it said of its end stays."""
        seen = self._ranks[report.rank]
        seen.heard = now
        if report.gone and not seen.report.gone:
            seen.gone_at = now
        if report.code not in (None, *NO_FAULT) and seen.report.code is None:
            seen.failed_at = now
        seen.report = report

    def lose(self, now: float, rank: int, how: str) -> None:
        """The connection to the rank's companion is closed without a goodbye; no fault if its end was said."""
        seen = self._ranks[rank]
        if seen.report.code is not None:
            seen.left = True
        elif not seen.left and seen.lost is None:
            seen.lost = how

    def leave(self, rank: int) -> None:
        """The rank's companion has said goodbye."""
        self._ranks[rank].left = True

    def last_report(self, rank: int) -> Report:
        return self._ranks[rank].report

    @property
    def over(self) -> bool:
        """Whether nobody is there any more."""
        return not any(seen.present for seen in self._ranks.values())

    @property
    def failing(self) -> bool:
        """Whether there is a first sign of something wrong."""
        return self._first is not None and not self._given

    def check(self, now: float) -> Verdict | None:
        """The verdict, once."""
        if self._given:
            return None
        self._excuse(now)
        if self._cause is None:
            signs = self._signs(now)
            if not signs:
                self._first = None
                return None
            self._first = now if self._first is None else self._first
            if now - self._first < SETTLE_S:
                return None
            order, cause = min(signs + self._stopped(), key=lambda sign: sign[0])
            if order[0] == UNSURE and self._may_end(now):
                return None
            self._cause = cause
        if self._cause.kind == "error" and (self.over or self._may_end(now)):
            return None
        self._given = True
        return self._cause

    def _may_end(self, now: float) -> bool:
        """Whether some rank has time left to end by itself after another's error."""
        some = any(seen.present and seen.report.code is None for seen in self._ranks.values())
        return some and now - (self._first or 0) < GRACE_S

    def _excuse(self, now: float) -> None:
        """Who is in a step may wait for those that are in a slow phase, no step ahead, and still in time."""
        slow = [
            seen.report.step
            for seen in self._ranks.values()
            if seen.present and seen.report.phase in ("start", "slow") and not self._overdue(seen)
        ]
        if not slow:
            return
        for seen in self._ranks.values():
            if seen.report.phase in ("step", "end") and seen.report.step >= min(slow):
                seen.excused = now

    def _overdue(self, seen: _Rank) -> bool:
        if seen.report.stopped_s > self._cfg.timeout_s:
            return True
        long = seen.report.phase in ("start", "slow")
        return seen.waiting_s > (self._cfg.slow_timeout_s if long else self._cfg.timeout_s)

    def _signs(self, now: float) -> list[tuple[tuple[float, ...], Verdict]]:
        """What is wrong now, with the order in which it counts as the cause."""
        found: list[tuple[tuple[float, ...], Verdict]] = []
        for rank, seen in self._ranks.items():
            report = seen.report
            if report.code is not None and report.code not in NO_FAULT:
                how = f"ended with an error (exit code {report.code}): {report.reason}"
                order = (UNSURE if report.unsure else 5, seen.failed_at, rank)
                found.append((order, Verdict("error", rank, how, report.code)))
            elif report.gone and report.code is None:
                how = f"is gone without a word (killed, or out of memory?) {place(report)}"
                found.append(((1, seen.gone_at, rank), Verdict("lost", rank, how)))
            if seen.left or report.gone:
                continue
            if seen.lost is not None:
                found.append(((3, 0, rank), Verdict("lost", rank, seen.lost)))
            elif now - seen.heard > max(self._cfg.timeout_s, LEAST_SILENCE_S):
                how = f"is lost: nothing was heard of its companion for {now - seen.heard:.1f} s"
                found.append(((3, 1, rank), Verdict("lost", rank, how)))
            elif self._overdue(seen) and now - report.silent_s <= self._first_failure() - SETTLE_S:
                behind = (4, report.step, -report.silent_s, rank)
                found.append((behind, Verdict("hang", rank, _hang(report))))
        return found

    def _first_failure(self) -> float:
        """When a rank first said that it ends with an error; who fell silent after that waits for that rank."""
        failed = [s.failed_at for s in self._ranks.values() if s.report.code not in (None, *NO_FAULT)]
        return min(failed, default=float("inf"))

    def _stopped(self) -> list[tuple[tuple[float, ...], Verdict]]:
        """Stopped ranks: no sign by themselves before their time is over, but a likely cause of one."""
        return [
            ((2, -seen.report.stopped_s, rank), Verdict("hang", rank, _hang(seen.report)))
            for rank, seen in self._ranks.items()
            if seen.present and seen.report.stopped and seen.report.stopped_s >= SETTLE_S
        ]


def _hang(report: Report) -> str:
    stopped = f"; it is stopped (state {report.state})" if report.stopped else ""
    return f"made no progress for {report.silent_s:.1f} s {place(report)}{stopped}"


def place(report: Report) -> str:
    """Where in the run a rank is, in words."""
    return {
        "start": "during start-up",
        "step": f"in step {report.step}",
        "slow": f"in slow work (first step, checkpoint, pictures, evaluation) at step {report.step}",
        "end": f"after its word that it ends (exit code {report.code})",
    }[report.phase]

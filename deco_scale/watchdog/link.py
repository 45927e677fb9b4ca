"""The companion of a rank other than 0 among the others."""

import selectors
import socket
import time
from dataclasses import asdict

from deco_scale.watchdog.decision import LEAST_SILENCE_S, Decision, Report
from deco_scale.watchdog.lines import LineSocket, Waiting
from deco_scale.watchdog.orders import Member, Order
from deco_scale.watchdog.settings import WatchdogConfig


class Link(Waiting):
    """The companion of another rank: it reports to the hub, and decides alone once the hub is lost or has left."""

    def __init__(self, cfg: WatchdogConfig, me: Member, hub: Member, *, now: float) -> None:
        super().__init__()
        self._cfg, self._me, self._hub = cfg, me, hub
        self._line: LineSocket | None = None
        self._order: Order | None = None
        self._alone: Decision | None = None
        self._heard, self._reported = now, float("-inf")
        self._last: Report | None = None

    def connect(self, host: str, port: int, token: str, seconds: float) -> None:
        """Join the others; raises ``OSError`` saying why it cannot."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                sock = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
                break
            except OSError:
                if time.monotonic() + 0.5 > deadline:
                    raise
                time.sleep(0.5)
        self._line = LineSocket(sock)
        self._selector.register(sock, selectors.EVENT_READ)
        self._line.send({"token": token, "member": self._me.message()})
        while time.monotonic() < deadline and not self._line.closed:
            self._selector.select(0.1)
            if any("welcome" in message for message in self._line.receive()):
                return
        raise ConnectionError("no welcome: refused, or too late")

    def wait(self, seconds: float, now: float) -> None:
        """Hear what comes within this time, at least once."""
        self._selector.select(seconds)
        if self._line is None:
            return
        self._line.flush()
        for message in self._line.receive():
            self._heard = now
            try:
                if "order" in message and self._order is None:
                    self._order = Order.parse(message["order"])
            except (KeyError, TypeError, ValueError, OverflowError):
                self._line.closed = True
            if "over" in message:
                self._decide_alone(now, lost=None)
                return
        silent_s = now - self._heard
        if self._line.closed:
            self._decide_alone(now, lost="is lost: the connection to its companion is closed")
        elif silent_s > max(self._cfg.timeout_s, LEAST_SILENCE_S):
            self._decide_alone(now, lost=f"is lost: nothing was heard of its companion for {silent_s:.1f} s")

    def _decide_alone(self, now: float, *, lost: str | None) -> None:
        assert self._line is not None
        self._selector.unregister(self._line.sock)
        self._line.close()
        self._line = None
        ranks = {self._me.rank} if lost is None else {self._me.rank, self._hub.rank}
        self._alone = Decision(ranks, self._cfg, now=now)
        if lost is not None:
            self._alone.lose(now, self._hub.rank, lost)

    def tick(self, now: float, report: Report) -> Order | None:
        """Report; the order to end, if there is one."""
        if self._order is not None or self._alone is None:
            self._report(report)
            return self._order
        self._alone.hear(now, report)
        verdict = self._alone.check(now)
        if verdict is None:
            return None
        hub_lost = verdict.rank == self._hub.rank
        found = self._alone.last_report(verdict.rank)
        orphans = [self._hub] if hub_lost else []
        return Order.of(verdict, self._hub if hub_lost else self._me, found, orphans)

    def _report(self, report: Report) -> None:
        """Now and then, and at once if something has changed that may matter."""
        last, mono = self._last, time.monotonic()
        changed = last is None or _matters(last) != _matters(report)
        if self._line is None or not (changed or mono - self._reported > min(1.0, self._cfg.timeout_s / 4)):
            return
        self._last, self._reported = report, mono
        self._line.send({"report": asdict(report)})

    def may_leave(self, since_s: float) -> bool:
        """Whether this companion may go after its trainer ended in order."""
        return True

    def say_stack(self, text: str) -> None:
        """The innermost frames of this rank, to the hub."""
        if self._line is not None:
            self._line.send({"stack": text[:2000]})

    def stack_of(self, rank: int, seconds: float, now: float) -> str | None:
        return None

    def close(self, now: float, *, linger_s: float = 0.0) -> None:
        """Say goodbye, with the last report before it."""
        if self._line is None:
            return
        self._line.send({"left": True})
        deadline = time.monotonic() + 1.0
        while not self._line.flush() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._line.close()
        self._line = None


def _matters(report: Report) -> tuple[str, bool, bool, int | None, bool]:
    """What is told at once."""
    return report.phase, report.stopped, report.gone, report.code, report.unsure

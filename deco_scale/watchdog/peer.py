"""The sidecar of ranks 1 to N among the others."""

import selectors
import socket
import time
from dataclasses import asdict

from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.diagnosis import CONNECTION_LOST, Diagnosis, RankReport, max_silence_s, silent
from deco_scale.watchdog.protocol import MALFORMED, MAX_STACK, Member, MessageSocket, TerminateOrder, parse


class Peer:
    """Reports to the coordinator, and decides alone once the coordinator is lost or has left."""

    def __init__(self, cfg: WatchdogConfig, me: Member, coordinator: Member, *, now: float) -> None:
        self.selector = selectors.DefaultSelector()
        self._cfg, self._me, self._coordinator = cfg, me, coordinator
        self._messages: MessageSocket | None = None
        self._order: TerminateOrder | None = None
        self._own_diagnosis: Diagnosis | None = None
        self._heard_at, self._reported_at = now, float("-inf")
        self._last_report: RankReport | None = None

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
        self._messages = MessageSocket(sock)
        self.selector.register(sock, selectors.EVENT_READ)
        self._messages.send({"token": token, "member": asdict(self._me)})
        while time.monotonic() < deadline and not self._messages.closed:
            self.selector.select(0.1)
            if any("welcome" in message for message in self._messages.receive()):
                return
        raise ConnectionError("the coordinator refused the connection or answered too late")

    def wait(self, seconds: float, now: float) -> None:
        """Handle what arrives within this time, at least once."""
        self.selector.select(seconds)
        if self._messages is None:
            return
        self._messages.flush()
        for message in self._messages.receive():
            self._heard_at = now
            try:
                if "order" in message and self._order is None:
                    self._order = parse(TerminateOrder, message["order"])
            except MALFORMED:
                self._messages.closed = True
            if "over" in message:
                self._decide_alone(now, lost=None)
                return
        silent_s = now - self._heard_at
        if self._messages.closed:
            self._decide_alone(now, lost=CONNECTION_LOST)
        elif silent_s > max_silence_s(self._cfg):
            self._decide_alone(now, lost=silent(silent_s))

    def _decide_alone(self, now: float, *, lost: str | None) -> None:
        assert self._messages is not None
        self.selector.unregister(self._messages.sock)
        self._messages.close()
        self._messages = None
        ranks = {self._me.rank} if lost is None else {self._me.rank, self._coordinator.rank}
        self._own_diagnosis = Diagnosis(ranks, self._cfg, now=now)
        if lost is not None:
            self._own_diagnosis.mark_lost(self._coordinator.rank, lost)

    def tick(self, now: float, report: RankReport) -> TerminateOrder | None:
        """Send a report; returns the order to terminate, if there is one."""
        if self._order is not None or self._own_diagnosis is None:
            self._send_report(report)
            return self._order
        self._own_diagnosis.update(now, report)
        fault = self._own_diagnosis.check(now)
        if fault is None:
            return None
        last_report = self._own_diagnosis.last_report(fault.rank)
        if fault.rank == self._coordinator.rank:
            return TerminateOrder(fault, self._coordinator, (self._coordinator,), last_report)
        return TerminateOrder(fault, self._me, (), last_report)

    def _send_report(self, report: RankReport) -> None:
        """Send it from time to time, and at once if something important has changed."""
        clock = time.monotonic()
        changed = self._last_report is None or _important(self._last_report) != _important(report)
        due = clock - self._reported_at > min(1.0, self._cfg.timeout_s / 4)
        if self._messages is not None and (changed or due):
            self._last_report, self._reported_at = report, clock
            self._messages.send({"report": asdict(report)})

    def may_exit(self, since_s: float) -> bool:
        """Whether this sidecar may exit after its trainer exited without a fault."""
        return True

    def send_stack(self, text: str) -> None:
        """Send the innermost frames of this rank to the coordinator."""
        if self._messages is not None:
            self._messages.send({"stack": text[:MAX_STACK]})

    def stack_of(self, rank: int, seconds: float, now: float) -> str | None:
        """None: only the coordinator has the other ranks' stacks."""
        return None

    def close(self, now: float, *, linger_s: float = 0.0) -> None:
        """Say goodbye, once the last report is sent."""
        if self._messages is None:
            return
        self._messages.send({"left": True})
        deadline = time.monotonic() + 1.0
        while not self._messages.flush() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._messages.close()
        self._messages = None


def _important(report: RankReport) -> tuple[object, ...]:
    return report.phase, report.stopped, report.gone, report.code, report.uncertain

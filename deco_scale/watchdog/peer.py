"""The sidecar of ranks 1 to N among the others."""

import asyncio
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.diagnosis import CONNECTION_LOST, Diagnosis, RankReport
from deco_scale.watchdog.protocol import BROKEN, MAX_LINE, MAX_STACK, Member, TerminateOrder, parse, receive, send


class Peer:
    """Reports to the coordinator, and decides alone once the coordinator is lost or has left.

    ``clock`` is that of the diagnosis, which has only this rank and the coordinator's.
    """

    def __init__(self, cfg: WatchdogConfig, me: Member, *, clock: Callable[[], float]) -> None:
        self._cfg, self._me, self._clock = cfg, me, clock
        self._writer: StreamWriter | None = None
        self._order: TerminateOrder | None = None
        self._reported: tuple[object, ...] = ()
        self._reported_at = float("-inf")

    async def connect(self, host: str, port: int, token: str, seconds: float) -> None:
        """Join the others; raises ``OSError`` saying why it cannot."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                async with asyncio.timeout(max(0.1, deadline - time.monotonic())):
                    reader, writer = await asyncio.open_connection(host, port, limit=MAX_LINE)
                break
            except OSError as error:
                if time.monotonic() + 0.5 > deadline:
                    raise OSError(str(error) or "timed out") from error
                await asyncio.sleep(0.5)
        send(writer, {"token": token, "member": asdict(self._me)})
        try:
            answer = await asyncio.wait_for(receive(reader), max(0.1, deadline - time.monotonic()))
            self._coordinator: Member = parse(Member, answer["welcome"])
        except BROKEN:
            raise ConnectionError("the coordinator refused the connection or answered too late") from None
        ranks = [self._me.rank, self._coordinator.rank]
        self._diagnosis = Diagnosis(ranks, self._cfg, now=self._clock())
        self._writer, self._task = writer, asyncio.create_task(self._listen(reader))

    async def _listen(self, reader: StreamReader) -> None:
        """Take in what the coordinator sends, for as long as it is connected."""
        rank = self._coordinator.rank
        with suppress(*BROKEN):
            while True:
                message = await receive(reader)
                self._diagnosis.update(self._clock(), RankReport(rank=rank))
                if "order" in message and self._order is None:
                    self._order = parse(TerminateOrder, message["order"])
                if "over" in message:
                    self._diagnosis.mark_left(rank)
        self._diagnosis.mark_lost(rank, CONNECTION_LOST)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def tick(self, report: RankReport) -> TerminateOrder | None:
        """Send a report; returns the order to terminate, if there is one."""
        now = self._clock()
        self._diagnosis.update(now, report)
        if self._writer is not None:
            self._send_report(self._writer, report)
        alone = self._writer is None or self._diagnosis.silent(self._coordinator.rank, now)
        fault = self._diagnosis.check(now) if alone and self._order is None else None
        if fault is None:
            return self._order
        lost = fault.rank == self._coordinator.rank
        member, orphans = (self._coordinator, (self._coordinator,)) if lost else (self._me, ())
        return TerminateOrder(fault, member, orphans, self._diagnosis.last_report(fault.rank))

    def _send_report(self, writer: StreamWriter, report: RankReport) -> None:
        """Send it from time to time, and at once if something important has changed."""
        clock = time.monotonic()
        important = (report.phase, report.stopped, report.gone, report.code, report.uncertain)
        if important != self._reported or clock - self._reported_at > min(1.0, self._cfg.timeout_s / 4):
            self._reported, self._reported_at = important, clock
            send(writer, {"report": asdict(report)})

    def send_stack(self, text: str) -> None:
        """Send the innermost frames of this rank to the coordinator."""
        if self._writer is not None:
            send(self._writer, {"stack": text[:MAX_STACK]})

    async def close(self, *, linger_s: float = 0.0) -> None:
        """Say goodbye, once the last report is sent."""
        writer, self._writer = self._writer, None
        if writer is not None:
            send(writer, {"left": True})
            writer.close()
            with suppress(OSError):
                await asyncio.wait_for(writer.wait_closed(), 1.0)

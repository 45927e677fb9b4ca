"""Rank 0's sidecar among the others: it receives all reports, decides, and sends the order to terminate.

The port accepts connections from anyone, but ignores all that do not begin with the job's token.
"""

import asyncio
import hmac
import resource
import socket
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from deco_scale.watchdog.config import WatchdogConfig
from deco_scale.watchdog.diagnosis import CONNECTION_LOST, Diagnosis, RankReport
from deco_scale.watchdog.protocol import (
    BACKLOG,
    BROKEN,
    MAX_LINE,
    MAX_STACK,
    Member,
    TerminateOrder,
    parse,
    receive,
    send,
)

_HELLO_S = 5.0
_MAX_STRANGERS = 64
_MAX_ORPHANS = 32
_ALIVE_S = 0.5
LINGER_S = 5.0
"""How long the coordinator waits for the others after its own trainer exited without a fault."""


class Coordinator:
    """Listens for the sidecars of ranks 1 to ``world_size`` - 1; ``clock`` is that of the diagnosis."""

    def __init__(
        self, cfg: WatchdogConfig, me: Member, *, world_size: int, token: str, clock: Callable[[], float]
    ) -> None:
        self._me, self._world_size, self._token, self._clock = me, world_size, token, clock
        self._diagnosis = Diagnosis(range(world_size), cfg, now=clock())
        self._strangers: dict[StreamWriter, None] = {}
        self._writers: dict[int, StreamWriter] = {}
        self._members = {me.rank: me}
        self._stacks: dict[int, str] = {}
        self._ordered = False
        self._server: asyncio.Server | None = None

    async def listen(self, descriptor: int | None, seconds: float) -> None:
        """Wait at a socket for the sidecars of all ranks; raises ``TimeoutError`` naming missing ones."""
        if descriptor is None:
            return
        # One connection per rank; the usual soft limit is 1024.
        with suppress(OSError, ValueError):
            hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
        sock = socket.socket(fileno=descriptor)
        self._server = await asyncio.start_server(self._serve, sock=sock, limit=MAX_LINE, backlog=BACKLOG)
        self._alive = asyncio.create_task(self._say_alive())
        deadline = time.monotonic() + seconds
        while self.missing:
            await asyncio.sleep(0.05)
            if time.monotonic() > deadline and self.missing:
                missing = ", ".join(map(str, self.missing[:20]))
                raise TimeoutError(f"the sidecars of ranks {missing} did not connect within {seconds:g} s")

    @property
    def missing(self) -> list[int]:
        """Ranks whose sidecar has not connected yet."""
        return sorted(set(range(self._world_size)) - self._members.keys())

    def tick(self, report: RankReport) -> TerminateOrder | None:
        """Take in rank 0's own report; returns the order to terminate, once, after sending it to all."""
        now = self._clock()
        self._diagnosis.update(now, report)
        fault = None if self._ordered or self.missing else self._diagnosis.check(now)
        if fault is None:
            return None
        watched = self._writers.keys() | {self._me.rank}
        orphans = [
            member
            for rank, member in sorted(self._members.items())
            if rank not in watched or (fault.kind == "lost" and rank == fault.rank != self._me.rank)
        ]
        member, last_report = self._members[fault.rank], self._diagnosis.last_report(fault.rank)
        order = TerminateOrder(fault, member, tuple(orphans[:_MAX_ORPHANS]), last_report)
        self._ordered = True
        self._send_all({"order": order.message})
        return order

    def may_exit(self, since_s: float) -> bool:
        """Whether this sidecar may exit, ``since_s`` after its trainer exited without a fault."""
        self._diagnosis.mark_left(self._me.rank)
        return self._diagnosis.finished or (since_s > LINGER_S and not self._diagnosis.suspicious)

    def send_stack(self, text: str) -> None:
        """The innermost frames of rank 0, kept here."""
        self._stacks[self._me.rank] = text

    async def stack_of(self, rank: int, seconds: float) -> str | None:
        """The innermost frames of a rank, waited for as long as it is connected."""
        deadline = time.monotonic() + seconds
        while rank not in self._stacks and rank in self._writers and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self._stacks.get(rank)

    async def close(self, *, linger_s: float = 0.0) -> None:
        """Let the others exit first for up to ``linger_s``, say goodbye, and free the port."""
        deadline = time.monotonic() + linger_s
        while self._writers and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._send_all({"over": True})
        for writer in [*self._strangers, *self._writers.values()]:
            writer.close()
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """A connection, for as long as it is open; a sidecar's rank is lost with it, unless it said goodbye."""
        if len(self._strangers) > _MAX_STRANGERS + len(self.missing):
            self._strangers.pop(oldest := next(iter(self._strangers)))
            oldest.close()
        self._strangers[writer] = None
        rank: int | None = None
        with suppress(*BROKEN, asyncio.CancelledError):  # Python 3.11 logs a connection's task that is cancelled
            async with asyncio.timeout(_HELLO_S):
                rank = self._admit(writer, await receive(reader))
            while True:
                self._handle(rank, await receive(reader))
        writer.close()
        self._strangers.pop(writer, None)
        if rank is not None:
            del self._writers[rank]
            self._diagnosis.mark_lost(rank, CONNECTION_LOST)

    def _admit(self, writer: StreamWriter, message: dict[str, Any]) -> int:
        """The first message: the token, and a rank that has not connected yet, which is returned."""
        if not hmac.compare_digest(str(message.get("token")).encode(), self._token.encode()):
            raise ValueError("wrong token")
        member: Member = parse(Member, message["member"])
        if member.rank not in self.missing:
            raise ValueError(f"rank {member.rank} is connected already, or not part of this job")
        del self._strangers[writer]
        self._members[member.rank], self._writers[member.rank] = member, writer
        self._diagnosis.update(self._clock(), RankReport(rank=member.rank))
        send(writer, {"welcome": asdict(self._me)})
        return member.rank

    def _handle(self, rank: int, message: dict[str, Any]) -> None:
        if "report" in message:
            self._diagnosis.update(self._clock(), parse(RankReport, {**message["report"], "rank": rank}))
        if "stack" in message:
            self._stacks[rank] = str(message["stack"])[:MAX_STACK]
        if "left" in message:
            self._diagnosis.mark_left(rank)

    async def _say_alive(self) -> None:
        while True:
            await asyncio.sleep(_ALIVE_S)
            self._send_all({"alive": True})

    def _send_all(self, message: dict[str, Any]) -> None:
        for writer in self._writers.values():
            send(writer, message)
